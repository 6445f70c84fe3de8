"""The policy `tiles`: a large picture is cut into tiles of the encoder's side.

Four rules say how many tiles, each from the size of the picture alone:

    anyres   of a list of grids the one that keeps most of the picture's pixels; the picture keeps
             its proportions and is padded (LLaVA-NeXT; `LlavaNextImageProcessor`)
    ratio    the grid whose proportions are nearest; the picture is squeezed into it (InternVL 1.5,
             arXiv 2404.16821; `GotOcr2ImageProcessor`)
    area     proportions, weighed with how much of the picture's area the grid covers, so that a
             large picture gets enough tiles (Eagle 2, arXiv 2501.14818)
    longest  the longer side becomes a number of tiles, the other follows (Idefics3,
             arXiv 2408.12637; `Idefics3ImageProcessor`)

and four layouts say in which order the language model reads the tokens; see `layout`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from mmlm.features import Grid, Size
from mmlm.images.base import (
    ImagePlan,
    ImagePolicyConfig,
    Tile,
    candidates,
    image_policies,
    nearest_ratio,
    stitched,
    whole,
    with_row_ends,
)
from mmlm.images.blend import Blend, framed, shrunk

_NEWLINE, _AROUND, _GLOBAL, _FIRST_PLACE = range(4)
_LARGEST_PX = 4096  # Idefics3 lets no side become longer than this
_COVERED = 0.6  # Eagle 2: more than this share of the area earns nothing


@image_policies.register("tiles")
class TilesConfig(ImagePolicyConfig):
    """Cut the picture into tiles of the encoder's side, and show it whole beside them."""

    needs_sizes: ClassVar[bool] = True

    rule: Literal["anyres", "ratio", "area", "longest"] = "ratio"
    """How many tiles: see the module's docstring, or `docs/vision.md`."""

    grids: tuple[tuple[int, int], ...] = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
    """Rows and columns of tiles that `anyres` chooses from; the first of equals is taken."""

    min_tiles: int = Field(default=1, ge=1)
    """Fewest tiles that `ratio` and `area` take."""

    max_tiles: int = Field(default=12, ge=1, le=64)
    """Most tiles that `ratio` and `area` take, the thumbnail not counted."""

    longest_tiles: int = Field(default=4, ge=1, le=16)
    """How many tiles long the longer side becomes under the rule `longest`."""

    thumbnail: Literal["first", "last", "none"] | None = None
    """Where the whole picture stands, as one more tile; first under `anyres`, else last. A
    picture of a single tile has none, but under `anyres`."""

    layout: Literal["plain", "newline", "unpad", "marks"] | None = None
    """`plain`: tile after tile. `newline`: the tiles as one map, with a learnt vector behind each
    row. `unpad`: the same without the rows or columns of padding. `marks`: learnt vectors say
    row and column of each tile. By default `unpad` for `anyres`, `marks` for `longest`."""

    shrink_above: int | None = Field(default=None, ge=1)
    """Layout `unpad` only: a map of more features than this many tiles have is shrunk to as many,
    bilinearly. LLaVA-OneVision's `anyres_max_9` is 9."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.min_tiles > self.max_tiles:
            raise ValueError(f"min_tiles {self.min_tiles} is above max_tiles {self.max_tiles}")
        if self.rule == "anyres" and (not self.grids or min(map(min, self.grids)) < 1):
            raise ValueError(
                "grids must name at least one grid of rows and columns, such as [2, 2]"
            )
        if self.layout == "unpad" and self.rule != "anyres":
            raise ValueError(
                f"layout unpad is for the rule anyres, which pads; {self.rule} does not: use "
                f"newline"
            )
        if self.shrink_above is not None and self._layout != "unpad":
            raise ValueError(
                f"shrink_above is for the layout unpad of the rule anyres; here the layout is "
                f"{self._layout}: leave it out"
            )
        return self

    @property
    def fill(self) -> Literal["mean", "black"]:
        """The colour of padding: LLaVA-NeXT pads with black."""
        return "black"

    @property
    def _thumbnail(self) -> str:
        return self.thumbnail or ("first" if self.rule == "anyres" else "last")

    @property
    def _layout(self) -> str:
        return self.layout or {"anyres": "unpad", "longest": "marks"}.get(self.rule, "plain")

    @property
    def _most(self) -> tuple[int, int]:
        """Most rows and columns of tiles."""
        if self.rule == "anyres":
            return max(rows for rows, _ in self.grids), max(columns for _, columns in self.grids)
        most = self.longest_tiles + 1 if self.rule == "longest" else self.max_tiles
        return most, most

    @property
    def num_marks(self) -> int:
        """One for the ends of rows, or one for each place of a tile besides."""
        if self._layout == "marks":
            rows, columns = self._most
            return _FIRST_PLACE + rows * columns
        return 0 if self._layout == "plain" else 1

    def plan(self, size: Size, side: Size, step: int = 1) -> ImagePlan:
        """Plan tiles in rows, and the thumbnail."""
        canvas_tiles, scaled, offset = self._canvas(size, side)
        rows, columns = canvas_tiles
        box = whole(size)
        tiles = [
            Tile(
                box, side, scaled, (row * side.height - offset[0], column * side.width - offset[1])
            )
            for row in range(rows)
            for column in range(columns)
        ]
        alone = rows * columns == 1 and self.rule != "anyres"
        thumbnail = self._thumbnail if not alone else "none"
        if thumbnail != "none":
            tiles.insert(0 if thumbnail == "first" else len(tiles), Tile(box, side))
        return ImagePlan(tuple(tiles), rows, columns, thumbnail != "none")

    def _canvas(self, size: Size, side: Size) -> tuple[tuple[int, int], Size, tuple[int, int]]:
        """Return rows and columns, the size of the resized picture, and where it begins."""
        if self.rule == "anyres":
            rows, columns = _most_kept(size, side, self.grids)
            canvas = Size(rows * side.height, columns * side.width)
            scaled = _inside(size, canvas)
            offset = (canvas.height - scaled.height) // 2, (canvas.width - scaled.width) // 2
            return (rows, columns), scaled, offset
        if self.rule == "longest":
            rows, columns = _along_longest(size, side, self.longest_tiles)
        elif self.rule == "ratio":
            rows, columns = nearest_ratio(size, side, self.min_tiles, self.max_tiles)
        else:
            rows, columns = _best_area(size, side, self.min_tiles, self.max_tiles)
        return (rows, columns), Size(rows * side.height, columns * side.width), (0, 0)

    def arrange(
        self, size: Size, plan: ImagePlan, grids: Sequence[Grid]
    ) -> NDArray[np.int64] | Blend | None:
        """Order the tokens as `layout` says."""
        layout = self._layout
        if layout == "plain":
            return None
        first = plan.thumbnail and self._thumbnail == "first"
        grid = grids[0]  # all tiles have the same side
        count = grid.num_tokens
        start = count if first else 0
        whole_picture = np.arange(count, dtype=np.int64)
        if not first:
            whole_picture += plan.rows * plan.columns * count
        if layout == "marks":
            parts = self._marked(plan, count, start)
            if plan.thumbnail:
                marks = np.array([-1 - _AROUND, -1 - _GLOBAL])
                parts.insert(0 if first else len(parts), np.concatenate([marks, whole_picture]))
            return np.concatenate([*parts, [-1 - _AROUND]]).astype(np.int64)
        places = stitched(plan, grid, start)
        if layout == "unpad":
            places = _unpadded(places, size)
        if self.shrink_above is not None:
            smaller = shrunk(places, self.shrink_above * count, _NEWLINE)
            if smaller is not None:
                return framed(smaller, whole_picture if plan.thumbnail else None, first)
        lines = with_row_ends(places, _NEWLINE)
        if not plan.thumbnail:
            return lines
        return np.concatenate([whole_picture, lines] if first else [lines, whole_picture])

    def _marked(self, plan: ImagePlan, count: int, start: int) -> list[NDArray[np.int64]]:
        """Return the tokens of the tiles, each behind its marks, rows ended by a newline."""
        if plan.rows * plan.columns == 1 and not plan.thumbnail:
            alone = np.arange(start, start + count, dtype=np.int64)
            return [np.array([-1 - _AROUND, -1 - _GLOBAL]), alone]
        _, most_columns = self._most
        parts: list[NDArray[np.int64]] = []
        for row in range(plan.rows):
            for column in range(plan.columns):
                place = _FIRST_PLACE + row * most_columns + column
                parts.append(np.array([-1 - _AROUND, -1 - place]))
                parts.append(np.arange(start, start + count, dtype=np.int64))
                start += count
            parts.append(np.array([-1 - _NEWLINE]))
        return parts


def _most_kept(size: Size, side: Size, grids: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the grid in which most of the picture's pixels survive, and least is wasted."""
    best, most, least_wasted = grids[0], 0, math.inf
    for rows, columns in grids:
        height, width = rows * side.height, columns * side.width
        scale = min(width / size.width, height / size.height)
        shown = int(size.width * scale) * int(size.height * scale)
        kept = min(shown, size.width * size.height)
        wasted = height * width - kept
        if kept > most or (kept == most and wasted < least_wasted):
            best, most, least_wasted = (rows, columns), kept, wasted
    return best


def _inside(size: Size, canvas: Size) -> Size:
    """Return the largest size of the picture's proportions inside a canvas, rounded up."""
    across, down = canvas.width / size.width, canvas.height / size.height
    if across < down:
        return Size(min(math.ceil(size.height * across), canvas.height), canvas.width)
    return Size(canvas.height, min(math.ceil(size.width * down), canvas.width))


def _best_area(size: Size, side: Size, least: int, most: int) -> tuple[int, int]:
    """Return the grid that covers most area at the truest proportions."""
    ratio, area = size.width / size.height, size.width * size.height
    best, highest = (1, 1), -1.0
    for rows, columns in candidates(least, most):
        covered = min(rows * columns * side.height * side.width / area, _COVERED)
        shape = columns / rows
        score = covered * min(shape / ratio, ratio / shape)
        if score > highest:
            best, highest = (rows, columns), score
    return best


def _along_longest(size: Size, side: Size, tiles: int) -> tuple[int, int]:
    """Return rows and columns when the longer side is `tiles` tiles long.

    With the roundings of `Idefics3ImageProcessor`: to an even length first, then up to whole
    tiles.
    """
    square = max(side)
    height, width = _longest_is(size, square * tiles, even=True)
    height, width = _longest_is(Size(height, width), _LARGEST_PX, even=False)
    ratio = width / height
    if width >= height:
        width = math.ceil(width / square) * square
        height = math.ceil(int(width / ratio) / square) * square
    else:
        height = math.ceil(height / square) * square
        width = math.ceil(int(height * ratio) / square) * square
    return max(1, height // square), max(1, width // square)


def _longest_is(size: Size, longest: int, *, even: bool) -> Size:
    """Return the size whose longer side is `longest`; if not `even`, only where it is longer."""
    height, width = size
    ratio = width / height
    if not even and max(size) <= longest:
        return size
    if width >= height:
        width, height = longest, int(longest / ratio)
        height += height % 2 if even else 0
    else:
        height, width = longest, int(longest * ratio)
        width += width % 2 if even else 0
    return Size(max(height, 1), max(width, 1))


def _unpadded(places: NDArray[np.int64], size: Size) -> NDArray[np.int64]:
    """Take the padding off a map of the whole canvas.

    Rounded as `LlavaNextModel` does it, but that a picture thinner than one feature keeps the
    middle of the map: the stock model would be left with nothing.
    """
    rows, columns = places.shape
    if size.width / size.height > columns / rows:
        kept = max(1, int(round(size.height * (columns / size.width), 7)))
        padding = max(0, (rows - kept) // 2)
        return places[padding : rows - padding]
    kept = max(1, int(round(size.width * (rows / size.height), 7)))
    padding = max(0, (columns - kept) // 2)
    return places[:, padding : columns - padding]
