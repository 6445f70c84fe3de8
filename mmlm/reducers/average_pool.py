"""The reducer `average_pool`: the mean over small blocks, so that the grid keeps its shape.

Unlike `pool` the number of features that are left follows the picture. LLaVA-NeXT-Video, Gemma 3
and the temporal pools of video models reduce so. On an odd grid the last blocks are smaller.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor
from torch.nn import functional

from mmlm.features import Grid, VisionFeatures
from mmlm.reducers.base import Reducer, ReducerConfig, each_grid, reducers


@reducers.register("average_pool")
class AveragePoolConfig(ReducerConfig):
    """Average blocks of neighbours; the grid becomes smaller by a factor."""

    factor: int = Field(default=2, ge=1)
    """Side of a block, in rows and columns."""

    frames: int = Field(default=1, ge=1)
    """Length of a block, in frames."""

    def out_grid(self, grid: Grid) -> Grid:
        """Divide by the sides of a block, rounded up."""
        return Grid(
            -(-grid.frames // self.frames),
            -(-grid.rows // self.factor),
            -(-grid.columns // self.factor),
        )

    def build(self, *, width: int) -> AveragePool:
        """Build the reducer; it has no weights."""
        return AveragePool(self)


class AveragePool(Reducer):
    """Averages blocks of neighbours.

    Shapes:
        values:  ``(Σ frames · rows · columns, width)``
        returns: ``(Σ ⌈frames/…⌉ · ⌈rows/factor⌉ · ⌈columns/factor⌉, width)``
    """

    def __init__(self, config: AveragePoolConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, features: VisionFeatures) -> VisionFeatures:
        """Average blocks of neighbours, item by item."""
        return each_grid(features, self._pool, self.config.out_grid)

    def _pool(self, dense: Tensor) -> Tensor:
        """Pool ``(items, frames, rows, columns, width)``."""
        block = (self.config.frames, self.config.factor, self.config.factor)
        maps = dense.movedim(-1, 1).float()  # there is no kernel for bfloat16 on CPU
        # A block that reaches beyond the border is divided by what it holds.
        return functional.avg_pool3d(maps, block, ceil_mode=True).movedim(1, -1).to(dense.dtype)
