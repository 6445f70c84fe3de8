"""The reducer `interpolate`: the map is resized like a picture.

Bilinear, without smoothing first: VideoLLaMA3 and LLaVA-OneVision bring the features of frames
to half their sides so; at half the sides it is the mean of 2 × 2, where the grid is even.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor
from torch.nn import functional

from mmlm.features import Grid, VisionFeatures
from mmlm.reducers.base import Reducer, ReducerConfig, each_grid, reducers


@reducers.register("interpolate")
class InterpolateConfig(ReducerConfig):
    """Resize the map bilinearly; the grid becomes smaller by a factor."""

    factor: int = Field(default=2, ge=1)
    """By how much rows and columns fall; rounded up, as in LLaVA-OneVision."""

    def out_grid(self, grid: Grid) -> Grid:
        """Divide rows and columns by the factor, rounded up."""
        return Grid(grid.frames, -(-grid.rows // self.factor), -(-grid.columns // self.factor))

    def build(self, *, width: int) -> Interpolate:
        """Build the reducer; it has no weights."""
        return Interpolate(self)


class Interpolate(Reducer):
    """Resizes the map of each frame.

    Shapes:
        values:  ``(Σ frames · rows · columns, width)``
        returns: ``(Σ frames · ⌈rows/factor⌉ · ⌈columns/factor⌉, width)``
    """

    def __init__(self, config: InterpolateConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, features: VisionFeatures) -> VisionFeatures:
        """Resize the map of each frame, item by item."""
        return each_grid(features, self._resize, self.config.out_grid)

    def _resize(self, dense: Tensor) -> Tensor:
        """Resize ``(items, frames, rows, columns, width)``."""
        grid = self.config.out_grid(Grid(*dense.shape[1:4]))
        maps = dense.flatten(0, 1).movedim(-1, 1)
        small = functional.interpolate(maps, size=(grid.rows, grid.columns), mode="bilinear")
        return small.movedim(1, -1).unflatten(0, dense.shape[:2])
