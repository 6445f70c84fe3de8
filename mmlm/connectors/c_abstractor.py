"""The connector `c_abstractor`: convolutions around a pool keep what is where.

Honeybee (Cha et al. 2024, arXiv 2312.06742): learnt positions, a stage of RegNet blocks, adaptive
average pooling to a square of M tokens, another stage, and two linear layers with SiLU. The
blocks are those of RegNetY with depthwise convolutions and layer norms over the channels.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from mmlm.connectors.base import Connector, ConnectorConfig, connectors
from mmlm.connectors.groups import each_group
from mmlm.features import Grid, VisionFeatures


@connectors.register("c_abstractor")
class CAbstractorConnectorConfig(ConnectorConfig):
    """Convolve, pool to few tokens, convolve, project (Honeybee's C-Abstractor)."""

    rows: int = Field(default=12, ge=1)
    """Rows that are left; a grid with fewer keeps its own."""

    columns: int = Field(default=12, ge=1)
    """Columns that are left; a grid with fewer keeps its own."""

    depth: int = Field(default=3, ge=1)
    """Blocks before the pool, and as many after it."""

    width: int = Field(default=1024, ge=4)
    """Channels of the blocks."""

    positions: int = Field(default=24, ge=1)
    """Side of the square of learnt positions; for another grid they are interpolated."""

    def out_grid(self, grid: Grid) -> Grid:
        """Return the pooled grid, with the frames of the one that goes in."""
        return Grid(grid.frames, min(grid.rows, self.rows), min(grid.columns, self.columns))

    def build(self, *, vision_width: int, text_width: int) -> CAbstractorConnector:
        """Build the connector between features and embeddings of these widths."""
        return CAbstractorConnector(vision_width, text_width, self)


class ChannelNorm(nn.Module):
    """Layer norm over the channels of maps ``(items, channels, rows, columns)``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, maps: Tensor) -> Tensor:
        """Normalise every place."""
        return self.norm(maps.movedim(1, -1)).movedim(-1, 1)


class RegBlock(nn.Module):
    """Bottleneck of RegNetY (Radosavovic et al. 2020): 1 × 1, depthwise 3 × 3, gate, 1 × 1.

    Shapes:
        maps: ``(items, channels, rows, columns)``
    """

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(width, out_width, 1, bias=False)
        self.enter_norm = ChannelNorm(out_width)
        self.spread = nn.Conv2d(out_width, out_width, 3, padding=1, groups=out_width, bias=False)
        self.spread_norm = ChannelNorm(out_width)
        squeezed = max(1, round(width / 4))
        self.squeeze = nn.Conv2d(out_width, squeezed, 1)
        self.excite = nn.Conv2d(squeezed, out_width, 1)
        self.leave = nn.Conv2d(out_width, out_width, 1, bias=False)
        self.leave_norm = ChannelNorm(out_width)
        wider = width != out_width
        self.bypass = nn.Conv2d(width, out_width, 1, bias=False) if wider else None
        self.bypass_norm = ChannelNorm(out_width) if wider else None

    def forward(self, maps: Tensor) -> Tensor:
        """Return the maps after the block."""
        inner = functional.silu(self.enter_norm(self.enter(maps)))
        inner = functional.silu(self.spread_norm(self.spread(inner)))
        mean = inner.mean((2, 3), keepdim=True)
        inner = inner * self.excite(functional.silu(self.squeeze(mean))).sigmoid()
        inner = self.leave_norm(self.leave(inner))
        if self.bypass is not None and self.bypass_norm is not None:
            maps = self.bypass_norm(self.bypass(maps))
        return functional.silu(inner + maps)


class CAbstractorConnector(Connector):
    """Convolves and pools each picture.

    Shapes:
        values:  ``(Σ frames · rows · columns, vision_width)``
        returns: ``(Σ frames · config.rows · config.columns, text_width)``
    """

    def __init__(
        self, vision_width: int, text_width: int, config: CAbstractorConnectorConfig
    ) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.positions = nn.Parameter(
            torch.empty(1, vision_width, config.positions, config.positions)
        )
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.before = nn.Sequential(*_stage(vision_width, width, config.depth))
        self.after = nn.Sequential(*_stage(width, width, config.depth))
        self.project = nn.Sequential(
            nn.Linear(width, text_width), nn.SiLU(), nn.Linear(text_width, text_width)
        )

    def forward(self, features: VisionFeatures) -> VisionFeatures:
        """Abstract each picture."""
        return each_group(features, self._abstract, self.config.out_grid)

    def _abstract(self, maps: list[Tensor]) -> Tensor:
        dense = maps[0]
        grid = self.config.out_grid(Grid(*dense.shape[1:4]))
        frames = dense.flatten(0, 1).movedim(-1, 1)
        frames = self.before(frames + self._positions_at(frames))
        pooled = functional.adaptive_avg_pool2d(frames, (grid.rows, grid.columns))
        tokens = self.after(pooled).movedim(1, -1)
        return self.project(tokens).reshape(dense.shape[0], grid.num_tokens, -1)

    def _positions_at(self, frames: Tensor) -> Tensor:
        """Return the learnt positions for the grid of these maps."""
        size = frames.shape[-2:]
        if self.positions.shape[-2:] == size:
            return self.positions
        places = functional.interpolate(
            self.positions.float(), size=size, mode="bicubic", align_corners=False
        )
        return places.to(frames.dtype)

    def last_linear(self) -> nn.Linear:
        """Return the last layer."""
        last = self.project[-1]
        assert isinstance(last, nn.Linear)
        return last


def _stage(width: int, out_width: int, depth: int) -> list[RegBlock]:
    return [RegBlock(width if index == 0 else out_width, out_width) for index in range(depth)]
