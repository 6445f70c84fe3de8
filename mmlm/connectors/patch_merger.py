"""The connector `patch_merger`: a norm over each patch, squares merged by one matrix, an MLP.

Mistral Small 3.1 and LightOnOCR (`Mistral3ForConditionalGeneration`) normalise before neighbours
are stacked, which no reducer with an MLP behind it does: so the merging is part of the connector.
The square is ordered by row, column, channel, as in `pixel_shuffle`; the stock class puts the
channel first, and its weights are permuted by `mmlm.hub.classes.mistral3`.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from mmlm.connectors.activations import ActivationName, activation
from mmlm.connectors.base import Connector, ConnectorConfig, connectors
from mmlm.connectors.groups import each_group
from mmlm.features import Grid, VisionFeatures


@connectors.register("patch_merger")
class PatchMergerConnectorConfig(ConnectorConfig):
    """Normalise patches, merge squares of them, and project (Mistral Small 3.1, LightOnOCR)."""

    factor: int = Field(default=2, ge=1)
    """Side of the squares; the number of tokens falls by its square. A grid that it does not
    divide is filled with zeros."""

    activation: ActivationName = "gelu"
    """What stands between the two layers behind the merging, by its name in transformers."""

    bias: bool = False
    """Whether those two layers have a bias."""

    eps: float = Field(default=1e-5, gt=0)
    """Added to the mean square in the norm; the stock class takes the language model's."""

    @property
    def cell(self) -> int:
        """Side of the square of features that one token stands for."""
        return self.factor

    def out_grid(self, grid: Grid) -> Grid:
        """Divide rows and columns by the factor, rounded up."""
        return Grid(grid.frames, -(-grid.rows // self.factor), -(-grid.columns // self.factor))

    def build(self, *, vision_width: int, text_width: int) -> PatchMergerConnector:
        """Build the connector between features and embeddings of these widths."""
        return PatchMergerConnector(vision_width, text_width, self)


class PatchMergerConnector(Connector):
    """Merges squares of normed features.

    Shapes:
        values:  ``(Σ frames · rows · columns, vision_width)``
        returns: ``(Σ frames · ⌈rows / factor⌉ · ⌈columns / factor⌉, text_width)``
    """

    def __init__(
        self, vision_width: int, text_width: int, config: PatchMergerConnectorConfig
    ) -> None:
        super().__init__()
        self.config = config
        self.norm = nn.RMSNorm(vision_width, eps=config.eps)
        self.merge = nn.Linear(vision_width * config.factor**2, vision_width, bias=False)
        self.layers = nn.Sequential(
            nn.Linear(vision_width, text_width, bias=config.bias),
            activation(config.activation),
            nn.Linear(text_width, text_width, bias=config.bias),
        )

    def forward(self, features: VisionFeatures) -> VisionFeatures:
        """Merge the squares of each item."""
        return each_group(features, self._merge, self.config.out_grid)

    def _merge(self, maps: list[Tensor]) -> Tensor:
        dense, factor = self.norm(maps[0]), self.config.factor
        rows, columns = dense.shape[2:4]
        dense = functional.pad(dense, (0, 0, 0, -columns % factor, 0, -rows % factor))
        squares = dense.unflatten(3, (-1, factor)).unflatten(2, (-1, factor)).transpose(3, 4)
        merged = self.merge(squares.flatten(4, 6))
        return self.layers(merged).flatten(1, 3)

    def last_linear(self) -> nn.Linear:
        """Return the last layer."""
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        return last
