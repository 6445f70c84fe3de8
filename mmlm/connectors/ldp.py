"""The connector `ldp`: an MLP, then two convolution blocks, the second of which halves the map.

MobileVLM V1 (arXiv 2312.16886): the blocks are MobileNetV3's, a depthwise 3 × 3 convolution, a
gate over channels (squeeze and excitation) and a 1 × 1 convolution, with layer norms over the
channels of each place instead of batch norms. The first block stands beside a bypass.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from mmlm.connectors.base import Connector, ConnectorConfig, connectors
from mmlm.connectors.groups import each_group
from mmlm.features import Grid, VisionFeatures

_DIVISOR, _SHARE = 8, 4


@connectors.register("ldp")
class LDPConnectorConfig(ConnectorConfig):
    """Project, mix neighbours and halve rows and columns by convolutions (MobileVLM V1)."""

    def out_grid(self, grid: Grid) -> Grid:
        """Halve rows and columns, rounded up."""
        return Grid(grid.frames, -(-grid.rows // 2), -(-grid.columns // 2))

    def build(self, *, vision_width: int, text_width: int) -> LDPConnector:
        """Build the connector between features and embeddings of these widths."""
        return LDPConnector(vision_width, text_width, self)


class LDPConnector(Connector):
    """Projects each feature and convolves the map twice.

    Shapes:
        values:  ``(Σ frames · rows · columns, vision_width)``
        returns: ``(Σ frames · ⌈rows / 2⌉ · ⌈columns / 2⌉, text_width)``
    """

    def __init__(self, vision_width: int, text_width: int, config: LDPConnectorConfig) -> None:
        super().__init__()
        self.config = config
        self.mlp = nn.Sequential(
            nn.Linear(vision_width, text_width), nn.GELU(), nn.Linear(text_width, text_width)
        )
        self.stay = _Block(text_width, stride=1)
        self.halve = _Block(text_width, stride=2)

    def forward(self, features: VisionFeatures) -> VisionFeatures:
        """Project each picture."""
        return each_group(features, self._project, self.config.out_grid)

    def _project(self, maps: list[Tensor]) -> Tensor:
        dense = self.mlp(maps[0])
        places = self.halve(self.stay(dense.flatten(0, 1).movedim(-1, 1)))
        return places.movedim(1, -1).reshape(dense.shape[0], -1, places.shape[1])


class _Block(nn.Module):
    """Depthwise convolution, gate over channels, and a 1 × 1 convolution.

    Shapes:
        maps:    ``(items, width, rows, columns)``
        returns: ``(items, width, ⌈rows / stride⌉, ⌈columns / stride⌉)``
    """

    def __init__(self, width: int, *, stride: int) -> None:
        super().__init__()
        self.stride = stride
        squeezed = _divisible(width // _SHARE)
        self.depth = nn.Conv2d(width, width, 3, stride, padding=1, groups=width, bias=False)
        self.depth_norm = nn.LayerNorm(width)
        self.squeeze = nn.Conv2d(width, squeezed, 1)
        self.excite = nn.Conv2d(squeezed, width, 1)
        self.point = nn.Conv2d(width, width, 1, bias=False)
        self.point_norm = nn.LayerNorm(width)

    def forward(self, maps: Tensor) -> Tensor:
        """Mix each place with its neighbours, then its channels."""
        mixed = functional.hardswish(_normed(self.depth_norm, self.depth(maps)))
        mean = mixed.mean((2, 3), keepdim=True)
        gate = functional.hardsigmoid(self.excite(functional.relu(self.squeeze(mean))))
        out = _normed(self.point_norm, self.point(gate * mixed))
        return out + maps if self.stride == 1 else out


def _normed(norm: nn.Module, maps: Tensor) -> Tensor:
    """Norm the channels of each place."""
    return norm(maps.movedim(1, -1)).movedim(-1, 1)


def _divisible(width: int) -> int:
    """Return the multiple of eight that MobileNet rounds a width to: never a tenth below it."""
    rounded = max(_DIVISOR, int(width + _DIVISOR / 2) // _DIVISOR * _DIVISOR)
    return rounded if rounded >= 0.9 * width else rounded + _DIVISOR
