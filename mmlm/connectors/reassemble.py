"""The connector `reassemble`: stages of the encoder become one map, coarse to fine (DPT).

Vision Transformers for Dense Prediction (Ranftl et al. 2021, arXiv 2103.13413): tokens of each
stage are laid out as a map, brought to their own resolution, and fused from the coarsest to the
finest by residual convolutions. The finest map is then pooled to as many tokens as are asked for
and projected. Stages of a hierarchical encoder have their resolutions already (`factors` 1).
"""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from mmlm.connectors.base import Connector, ConnectorConfig, connectors
from mmlm.connectors.groups import each_group
from mmlm.features import Grid, VisionFeatures


@connectors.register("reassemble")
class ReassembleConnectorConfig(ConnectorConfig):
    """Fuse several layers of the encoder, coarse to fine, into one map of chosen size (DPT).

    The paper reads four layers of a ViT (`factors: [4, 2, 1, 0.5]`, `widths: [96, 192, 384, 768]`
    for ViT-B). With one factor only the features themselves are read.
    """

    factors: tuple[float, ...] = (1.0,)
    """For each layer, from first to last, by how much its map grows: 4, 2, 1, or 0.5 to shrink."""

    layer_width: int = Field(default=256, ge=1)
    """Channels that each layer is projected to, unless `widths` says otherwise."""

    widths: tuple[int, ...] | None = None
    """Channels that each layer is projected to, one for each factor."""

    width: int = Field(default=256, ge=1)
    """Channels of the fused maps."""

    rows: int = Field(default=12, ge=1)
    """Rows of tokens that are left; a grid with fewer keeps its own."""

    columns: int = Field(default=12, ge=1)
    """Columns of tokens that are left; a grid with fewer keeps its own."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not self.factors:
            raise ValueError("factors must name at least one layer")
        for factor in self.factors:
            whole = factor if factor >= 1 else 1 / factor if factor > 0 else 0
            if whole != int(whole) or whole < 1:
                raise ValueError(f"factors must be 1, 2, 4, … or 0.5, 0.25, …; got {factor}")
        if self.widths is not None and len(self.widths) != len(self.factors):
            raise ValueError(
                f"{len(self.widths)} widths do not fit {len(self.factors)} factors; "
                f"give one for each layer"
            )
        return self

    @property
    def layers(self) -> int:
        """How many further layers of the encoder are read: none where one factor stands."""
        return len(self.factors) if len(self.factors) > 1 else 0

    def out_grid(self, grid: Grid) -> Grid:
        """Return the pooled grid, with the frames of the one that goes in."""
        return Grid(grid.frames, min(grid.rows, self.rows), min(grid.columns, self.columns))

    def build(self, *, vision_width: int, text_width: int) -> ReassembleConnector:
        """Build the connector between features and embeddings of these widths."""
        return ReassembleConnector(vision_width, text_width, self)


class Residual(nn.Module):
    """Two convolutions with ReLU before each, beside a bypass (RefineNet's unit)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, maps: Tensor) -> Tensor:
        """Return the maps after the unit: ``(items, width, rows, columns)``."""
        return maps + self.second(self.first(maps.relu()).relu())


class Fusion(nn.Module):
    """Adds one finer layer to what is fused already, and doubles the resolution."""

    def __init__(self, width: int, *, first: bool) -> None:
        super().__init__()
        self.of_layer = None if first else Residual(width)
        self.of_fused = Residual(width)
        self.project = nn.Conv2d(width, width, 1)

    def forward(self, fused: Tensor, layer: Tensor | None) -> Tensor:
        """Return the fused maps, twice as large: ``(items, width, rows, columns)``."""
        if layer is not None and self.of_layer is not None:
            if layer.shape != fused.shape:
                layer = functional.interpolate(
                    layer, size=fused.shape[-2:], mode="bilinear", align_corners=False
                )
            fused = fused + self.of_layer(layer)
        fused = self.of_fused(fused)
        fused = functional.interpolate(fused, scale_factor=2, mode="bilinear", align_corners=True)
        return self.project(fused)


class ReassembleConnector(Connector):
    """Fuses the layers of each picture into one map of tokens.

    Shapes:
        layers:  ``(Σ frames · rows · columns, vision_width)``, each with its own grids
        returns: ``(Σ frames · config.rows · config.columns, text_width)``
    """

    def __init__(
        self, vision_width: int, text_width: int, config: ReassembleConnectorConfig
    ) -> None:
        super().__init__()
        self.config = config
        widths = config.widths or (config.layer_width,) * len(config.factors)
        self.projections = nn.ModuleList(nn.Conv2d(vision_width, width, 1) for width in widths)
        self.resizers = nn.ModuleList(
            _resizer(width, factor) for width, factor in zip(widths, config.factors, strict=True)
        )
        self.narrow = nn.ModuleList(
            nn.Conv2d(width, config.width, 3, padding=1, bias=False) for width in widths
        )
        self.fusions = nn.ModuleList(
            Fusion(config.width, first=index == 0) for index in range(len(widths))
        )
        self.project = nn.Sequential(
            nn.LayerNorm(config.width), nn.Linear(config.width, text_width)
        )

    def forward(self, features: VisionFeatures) -> VisionFeatures:
        """Fuse the layers of each picture."""
        return each_group(features, self._tokens, self.config.out_grid, layers=self.config.layers)

    def fuse(self, layers: list[Tensor]) -> Tensor:
        """Fuse maps ``(items, vision_width, rows, columns)``, first layer first, into one."""
        stages = zip(self.projections, self.resizers, self.narrow, layers, strict=True)
        maps = [narrow(resize(project(layer))) for project, resize, narrow, layer in stages]
        fused: Tensor = self.fusions[0](maps[-1], None)
        for fusion, layer in zip(list(self.fusions)[1:], maps[-2::-1], strict=True):
            fused = fusion(fused, layer)
        return fused

    def _tokens(self, maps: list[Tensor]) -> Tensor:
        dense = maps[0]
        grid = self.config.out_grid(Grid(*dense.shape[1:4]))
        layers = maps[1:] or maps
        fused = self.fuse([layer.flatten(0, 1).movedim(-1, 1) for layer in layers])
        pooled = functional.adaptive_avg_pool2d(fused, (grid.rows, grid.columns))
        return self.project(pooled.movedim(1, -1).reshape(dense.shape[0], grid.num_tokens, -1))

    def last_linear(self) -> nn.Linear:
        """Return the layer to the text width."""
        last = self.project[-1]
        assert isinstance(last, nn.Linear)
        return last


def _resizer(width: int, factor: float) -> nn.Module:
    """Return what makes a map larger or smaller by a factor."""
    if factor > 1:
        return nn.ConvTranspose2d(width, width, int(factor), stride=int(factor))
    if factor < 1:
        return nn.Conv2d(width, width, 3, stride=round(1 / factor), padding=1)
    return nn.Identity()
