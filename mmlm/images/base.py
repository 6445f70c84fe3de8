"""What every image policy is: a pure function from a size to tiles.

A policy never sees pixels and never imports torch, so that a million samples can be planned
from their headers alone. What a tile looks like is the work of `mmlm.images.resize`; how many
tokens it becomes follows from the encoder's and the reducer's `out_grid`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from mmlm.config import PartConfig
from mmlm.errors import ConfigError
from mmlm.features import Grid, Size
from mmlm.images.blend import Blend
from mmlm.images.readers import Readers, all_readers
from mmlm.registry import Registry


class Tile(NamedTuple):
    """One rectangle of the picture, and how the encoder gets it.

    The box is cut out of the source and resized to `scaled`; a window of `size` whose top left
    corner is `at` is what the encoder gets. Most policies leave the last two alone: the box is
    resized to `size`, and all of it is used.
    """

    box: tuple[int, int, int, int]
    """Left, top, right, bottom in source pixels. What lies outside the picture is filled."""

    size: Size
    """Height and width of what the encoder gets, in pixels."""

    scaled: Size | None = None
    """What the box is resized to, where the tile is only a window of it."""

    at: tuple[int, int] = (0, 0)
    """Top and left of the window in the resized box; outside of it, the tile is filled."""


class ImagePlan(NamedTuple):
    """The tiles of one picture, in the order in which the language model reads them."""

    tiles: tuple[Tile, ...]
    """All tiles; a thumbnail, if there is one, comes where the policy says."""

    rows: int
    """Rows of tiles, the thumbnail not counted."""

    columns: int
    """Columns of tiles, the thumbnail not counted."""

    thumbnail: bool = False
    """Whether one more tile shows the whole picture."""


class ImagePolicyConfig(PartConfig):
    """Base of the image policies."""

    ragged: ClassVar[bool] = False
    """Whether the tiles have sizes of their own, instead of the encoder's side."""

    needs_sizes: ClassVar[bool] = False
    """Whether the order of tokens follows from the size of the picture."""

    read: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Settings of the readers of pictures, such as {dicom: {window: [40, 400]}}; `mmlm parts
    reader` lists them. They travel with the model."""

    @field_validator("read")
    @classmethod
    def _known_readers(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        all_readers(value)
        return value

    @property
    def readers(self) -> Readers:
        """What opens the pictures of this model."""
        return all_readers(self.read)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; `read` only where it says something."""
        values = super().to_dict()
        if not self.read:
            del values["read"]
        return values

    def plan(self, size: Size, side: Size, step: int = 1) -> ImagePlan:
        """Plan the tiles of a picture of `size` for an encoder that takes `side`.

        Args:
            size: Height and width of the picture, upright, at least one pixel each.
            side: Height and width that the encoder takes.
            step: What other sides must be a multiple of; one cell of `step` by `step` pixels
                becomes one token. Only policies that are `ragged` ask for it.
        """
        raise NotImplementedError

    @property
    def fill(self) -> Literal["mean", "black", "near_black"]:
        """The colour outside the picture: the encoder's mean, black, or 1 of 255."""
        return "mean"

    @property
    def num_marks(self) -> int:
        """How many learnt vectors `arrange` may put between the features of a picture."""
        return 0

    def arrange(
        self, size: Size, plan: ImagePlan, grids: Sequence[Grid]
    ) -> NDArray[np.int64] | Blend | None:
        """Say in which order the language model reads the tokens of one picture.

        Args:
            size: Height and width of the picture.
            plan: What `plan` gave for it.
            grids: The grid of each tile when it reaches the language model.

        Returns:
            One number for each token: the place of a feature in the packed features of the
            picture, or ``-1 - k`` for mark k; or a `Blend` of such numbers. None where the
            features stay as they are.
        """
        return None


image_policies: Registry[ImagePolicyConfig] = Registry("image policy", plural="image_policies")


def whole(size: Size) -> tuple[int, int, int, int]:
    """Return the box that holds the whole picture."""
    return (0, 0, size.width, size.height)


def one_tile(tile: Tile) -> ImagePlan:
    """Return the plan that has this tile and no other."""
    return ImagePlan(tiles=(tile,), rows=1, columns=1)


def stitched(plan: ImagePlan, grid: Grid, first: int) -> NDArray[np.int64]:
    """Return the places of features as one map over all tiles but the thumbnail.

    Args:
        plan: The tiles.
        grid: The grid of each tile.
        first: Where the features of the first tile begin.

    Returns:
        ``(plan.rows · grid.rows, plan.columns · grid.columns)``

    Raises:
        ConfigError: if the tokens of a tile stand for no places (a resampler's).
    """
    size = plan.tiles[0].size
    is_list = grid.rows == 1 and 2 * size.width < grid.columns * size.height
    if grid.frames != 1 or is_list:
        raise ConfigError(
            f"The image policy joins tiles into one map, but a tile has {grid.num_tokens} tokens "
            f"without places ({grid.frames} x {grid.rows} x {grid.columns}) after the reducer and "
            f"the connector. Use `image.layout: plain`, or a connector that keeps the grid."
        )
    count = plan.rows * plan.columns * grid.num_tokens
    places = np.arange(first, first + count, dtype=np.int64)
    tiles = places.reshape(plan.rows, plan.columns, grid.rows, grid.columns)
    return tiles.transpose(0, 2, 1, 3).reshape(plan.rows * grid.rows, -1)


def with_row_ends(places: NDArray[np.int64], mark: int) -> NDArray[np.int64]:
    """Put a mark behind each row of a map, and return it row by row."""
    ends = np.full((places.shape[0], 1), -1 - mark, dtype=np.int64)
    return np.concatenate([places, ends], axis=1).reshape(-1)


@cache
def candidates(least: int, most: int) -> tuple[tuple[int, int], ...]:
    """Return grids as rows and columns, those of fewer tiles first."""
    grids = [
        (rows, columns)
        for columns in range(1, most + 1)
        for rows in range(1, most + 1)
        if least <= rows * columns <= most
    ]
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def nearest_ratio(size: Size, side: Size, least: int, most: int) -> tuple[int, int]:
    """Return the grid of nearest proportions; of equals the larger, while it is not too large."""
    ratio, area = size.width / size.height, size.width * size.height
    best, nearest = (1, 1), math.inf
    for rows, columns in candidates(least, most):
        off = abs(ratio - columns / rows)
        large = area > 0.5 * side.height * side.width * rows * columns
        if off < nearest or (off == nearest and large):
            best, nearest = (rows, columns), off
    return best
