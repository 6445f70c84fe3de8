"""The connector `ldpv2`: an MLP, a pool to few tokens, and a convolution that tells places apart.

MobileVLM V2 (arXiv 2402.03766): two linear layers, adaptive average pooling to 12 × 12, then a
depthwise 3 × 3 convolution beside a bypass (a conditional position encoding).
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from mmlm.connectors.base import Connector, ConnectorConfig, connectors
from mmlm.connectors.groups import each_group
from mmlm.features import Grid, VisionFeatures


@connectors.register("ldpv2")
class LDPv2ConnectorConfig(ConnectorConfig):
    """Project, pool, and add places by a depthwise convolution (MobileVLM V2)."""

    rows: int = Field(default=12, ge=1)
    """Rows that are left; a grid with fewer keeps its own."""

    columns: int = Field(default=12, ge=1)
    """Columns that are left; a grid with fewer keeps its own."""

    def out_grid(self, grid: Grid) -> Grid:
        """Return the pooled grid, with the frames of the one that goes in."""
        return Grid(grid.frames, min(grid.rows, self.rows), min(grid.columns, self.columns))

    def build(self, *, vision_width: int, text_width: int) -> LDPv2Connector:
        """Build the connector between features and embeddings of these widths."""
        return LDPv2Connector(vision_width, text_width, self)


class LDPv2Connector(Connector):
    """Projects each feature, pools the map and convolves it.

    Shapes:
        values:  ``(Σ frames · rows · columns, vision_width)``
        returns: ``(Σ frames · config.rows · config.columns, text_width)``
    """

    def __init__(self, vision_width: int, text_width: int, config: LDPv2ConnectorConfig) -> None:
        super().__init__()
        self.config = config
        self.mlp = nn.Sequential(
            nn.Linear(vision_width, text_width), nn.GELU(), nn.Linear(text_width, text_width)
        )
        self.places = nn.Conv2d(text_width, text_width, 3, padding=1, groups=text_width)

    def forward(self, features: VisionFeatures) -> VisionFeatures:
        """Project each picture."""
        return each_group(features, self._project, self.config.out_grid)

    def _project(self, maps: list[Tensor]) -> Tensor:
        dense = self.mlp(maps[0])
        grid = self.config.out_grid(Grid(*dense.shape[1:4]))
        pooled = functional.adaptive_avg_pool2d(
            dense.flatten(0, 1).movedim(-1, 1), (grid.rows, grid.columns)
        )
        pooled = pooled + self.places(pooled)
        return pooled.movedim(1, -1).reshape(dense.shape[0], grid.num_tokens, -1)
