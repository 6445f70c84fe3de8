"""What every image policy is: a pure function from a size to tiles.

A policy never sees pixels and never imports torch, so that a million samples can be planned
from their headers alone. What a tile looks like is the work of `mmlm.images.resize`; how many
tokens it becomes follows from the encoder's and the reducer's `out_grid`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from pydantic import Field, field_validator

from mmlm.config import PartConfig
from mmlm.features import Size
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

    def plan(self, size: Size, side: Size) -> ImagePlan:
        """Plan the tiles of a picture of `size` for an encoder that takes `side`.

        Args:
            size: Height and width of the picture, upright, at least one pixel each.
            side: Height and width that the encoder takes.
        """
        raise NotImplementedError


image_policies: Registry[ImagePolicyConfig] = Registry("image policy", plural="image_policies")


def whole(size: Size) -> tuple[int, int, int, int]:
    """Return the box that holds the whole picture."""
    return (0, 0, size.width, size.height)


def one_tile(tile: Tile) -> ImagePlan:
    """Return the plan that has this tile and no other."""
    return ImagePlan(tiles=(tile,), rows=1, columns=1)
