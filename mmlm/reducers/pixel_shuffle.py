"""The reducer `pixel_shuffle`: neighbours are stacked, so that nothing is lost.

A square of factor × factor features becomes one that is factor² as wide. The order inside it
is row, column, channel, as in InternVL, Idefics3, SmolVLM and LFM2-VL (Mistral3 and LightOnOCR
put the channel first; their weights must be permuted).
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor
from torch.nn import functional

from mmlm.errors import ConfigError
from mmlm.features import Grid, VisionFeatures
from mmlm.reducers.base import Reducer, ReducerConfig, each_grid, reducers


@reducers.register("pixel_shuffle")
class PixelShuffleConfig(ReducerConfig):
    """Stack squares of neighbouring features into one wider feature."""

    factor: int = Field(default=2, ge=1)
    """Side of the square; the number of features falls by its square."""

    pad: bool = False
    """Fill an odd grid with zeros below and on the right (NVILA). No stock class does."""

    def out_grid(self, grid: Grid) -> Grid:
        """Divide rows and columns by the factor."""
        if not self.pad and (grid.rows % self.factor or grid.columns % self.factor):
            raise ConfigError(
                f"reducer.factor {self.factor} does not divide the grid of {grid.rows} x "
                f"{grid.columns} features that the encoder gives. Choose a `vision.side_px` whose "
                f"grid it divides (the grid is the side divided by the stride), another factor, "
                f"or `reducer.pad: true`; an encoder that keeps prefix tokens has no grid."
            )
        rows, columns = -(-grid.rows // self.factor), -(-grid.columns // self.factor)
        return Grid(grid.frames, rows, columns)

    def out_width(self, width: int) -> int:
        """Multiply the width by the square of the factor."""
        return width * self.factor**2

    def build(self, *, width: int) -> PixelShuffle:
        """Build the reducer; it has no weights."""
        return PixelShuffle(self)


class PixelShuffle(Reducer):
    """Stacks squares of neighbouring features.

    Shapes:
        values:  ``(Σ frames · rows · columns, width)``
        returns: ``(Σ frames · rows/factor · columns/factor, width · factor²)``
    """

    def __init__(self, config: PixelShuffleConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, features: VisionFeatures) -> VisionFeatures:
        """Stack squares of neighbouring features, item by item."""
        for grid in set(features.grids):
            self.config.out_grid(grid)  # refuses a grid that does not divide
        return each_grid(
            features, lambda dense: pixel_shuffle(dense, self.config.factor), self.config.out_grid
        )


def pixel_shuffle(dense: Tensor, factor: int) -> Tensor:
    """Stack squares of ``factor × factor`` neighbours; a grid that does not divide is padded.

    Args:
        dense: ``(..., rows, columns, width)``
        factor: Side of the square.

    Returns:
        ``(..., ⌈rows / factor⌉, ⌈columns / factor⌉, factor² · width)``, in the square ordered
        by row, then column, then channel.
    """
    *lead, rows, columns, width = dense.shape
    below, right = -rows % factor, -columns % factor
    if below or right:
        dense = functional.pad(dense, (0, 0, 0, right, 0, below))
    rows, columns = (rows + below) // factor, (columns + right) // factor
    squares = dense.reshape(*lead, rows, factor, columns, factor, width)
    return squares.transpose(-4, -3).reshape(*lead, rows, columns, factor * factor * width)
