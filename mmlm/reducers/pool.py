"""The reducer `pool`: the mean over equal parts of the grid, to a fixed number of features."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor
from torch.nn import functional

from mmlm.errors import ConfigError
from mmlm.features import Grid, VisionFeatures
from mmlm.reducers.base import Reducer, ReducerConfig, each_grid, reducers


@reducers.register("pool")
class PoolConfig(ReducerConfig):
    """Average neighbours until `rows` × `columns` features are left.

    Where the grid does not divide, neighbouring windows overlap (adaptive average pooling, as
    in PerceptionLM). A grid that is smaller already is refused.
    """

    rows: int = Field(default=4, ge=1)
    """Rows that are left."""

    columns: int = Field(default=4, ge=1)
    """Columns that are left."""

    frames: int | None = Field(default=None, ge=1)
    """Frames that are left of a longer clip (PLLaVA: 16); by default all."""

    def out_grid(self, grid: Grid) -> Grid:
        """Return the fixed grid; a clip that is shorter already keeps its frames."""
        if grid.rows < self.rows or grid.columns < self.columns:
            raise ConfigError(
                f"The reducer `pool` to {self.rows} x {self.columns} cannot make more of the "
                f"{grid.rows} x {grid.columns} features that the encoder gives. Lower "
                f"reducer.rows and reducer.columns, or raise vision.side_px."
            )
        frames = grid.frames if self.frames is None else min(grid.frames, self.frames)
        return Grid(frames, self.rows, self.columns)

    def build(self, *, width: int) -> Pool:
        """Build the reducer; it has no weights."""
        return Pool(self)


class Pool(Reducer):
    """Averages neighbours.

    Shapes:
        values:  ``(Σ frames · rows · columns, width)``
        returns: ``(Σ frames · config.rows · config.columns, width)``, or fewer frames
    """

    def __init__(self, config: PoolConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, features: VisionFeatures) -> VisionFeatures:
        """Average neighbours, item by item."""
        for grid in set(features.grids):
            self.config.out_grid(grid)  # refuses a grid that is too small
        return each_grid(features, self._pool, self.config.out_grid)

    def _pool(self, dense: Tensor) -> Tensor:
        """Pool ``(items, frames, rows, columns, width)``."""
        grid = self.config.out_grid(Grid(*dense.shape[1:4]))
        if grid.frames != dense.shape[1]:
            clips = dense.movedim(-1, 1).float()
            size = (grid.frames, grid.rows, grid.columns)
            return functional.adaptive_avg_pool3d(clips, size).movedim(1, -1).to(dense.dtype)
        maps = dense.flatten(0, 1).movedim(-1, 1)
        pooled = functional.adaptive_avg_pool2d(maps, (grid.rows, grid.columns))
        return pooled.movedim(1, -1).unflatten(0, dense.shape[:2])
