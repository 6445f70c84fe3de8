"""The policy `native`: the picture at its own proportions, as one tile of a size of its own.

Five rules turn the size of the picture into sides that are multiples of the encoder's step:

    smart      the nearest multiples, scaled into a budget of tokens only where needed
               (Qwen2-VL, arXiv 2409.12191; `smart_resize`)
    fit        as large as the budget allows, small pictures enlarged (NaFlex of SigLIP 2, arXiv
               2502.14786; `Siglip2ImageProcessor`)
    long_side  the longer side at most `long_side_px`, both rounded up (SOLO, arXiv 2407.06438;
               Pixtral, arXiv 2410.07073; `PixtralImageProcessor`)
    padded     shrunk into `box_px`, never enlarged, then padded at the right and below to whole
               cells (Fuyu, Adept 2023; `FuyuImageProcessor`)
    squares    a number of squares of the step in the nearest proportions (dynamic S² of NVILA,
               arXiv 2412.04468, for the encoder `scales`)

The encoder must take such sizes (its facts say the rule `multiple`). Tiles of different sizes
share a batch without padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from mmlm.features import Grid, Size
from mmlm.images.base import (
    ImagePlan,
    ImagePolicyConfig,
    Tile,
    image_policies,
    nearest_ratio,
    one_tile,
    stitched,
    whole,
    with_row_ends,
)

_ROW_END, _BEGIN, _END = range(3)
_FIT_PRECISION = 1e-5  # of the scale, as the stock processor searches it


@image_policies.register("native")
class NativeConfig(ImagePolicyConfig):
    """Keep the proportions of the picture; how many tokens it becomes follows from its size."""

    ragged: ClassVar[bool] = True
    needs_sizes: ClassVar[bool] = True

    rule: Literal["smart", "fit", "long_side", "padded", "squares"] = "smart"
    """How large the picture becomes: see the module's docstring, or `docs/vision.md`."""

    min_tokens: int = Field(default=4, ge=1)
    """Fewest cells of a picture, under `smart`: smaller pictures are enlarged."""

    max_tokens: int = Field(default=1024, ge=1)
    """Most cells of a picture, but for `padded` and `squares`, which have limits of their own. A
    cell is what becomes one token: a patch, or the square of patches that the reducer joins."""

    long_side_px: int = Field(default=1024, ge=1)
    """Longest side under the rule `long_side`, in pixels."""

    box_px: tuple[int, int] = (1080, 1920)
    """Greatest height and width under the rule `padded`, in pixels."""

    squares: tuple[int, int] = (9, 12)
    """Fewest and most squares under the rule `squares`."""

    layout: Literal["plain", "row_ends", "framed"] = "plain"
    """`plain`: row after row. `row_ends`: a learnt vector behind each row (Fuyu). `framed`: one
    before and one behind the picture besides (SOLO)."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.rule == "smart" and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}")
        if min(self.box_px) < 1:
            raise ValueError(f"box_px {list(self.box_px)} must be two numbers of 1 or more")
        if not 1 <= self.squares[0] <= self.squares[1]:
            raise ValueError(f"squares {list(self.squares)} must be two numbers that grow from 1")
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; `box_px` only under the rule that reads it."""
        values = super().to_dict()
        if self.rule != "padded":
            del values["box_px"]
        return values

    @property
    def fill(self) -> Literal["mean", "black", "near_black"]:
        """What stands in the padding of `padded`: 1 of 255, as in Fuyu's own."""
        return "near_black" if self.rule == "padded" else "mean"

    @property
    def num_marks(self) -> int:
        """One for the ends of rows, two more for the frame."""
        return {"plain": 0, "row_ends": 1, "framed": 3}[self.layout]

    def plan(self, size: Size, side: Size, step: int = 1) -> ImagePlan:
        """Plan one tile of the picture's proportions."""
        if self.rule == "padded":
            return one_tile(_padded(size, step, Size(*self.box_px)))
        if self.rule == "smart":
            scaled = _smart(size, step, self.min_tokens, self.max_tokens)
        elif self.rule == "fit":
            scaled = _fit(size, step, self.max_tokens)
        elif self.rule == "squares":
            rows, columns = nearest_ratio(size, Size(step, step), *self.squares)
            scaled = Size(rows * step, columns * step)
        else:
            shrink = max(1.0, max(size) / self.long_side_px)
            cells = [max(1, math.ceil(math.floor(pixels / shrink) / step)) for pixels in size]
            scaled = Size(cells[0] * step, cells[1] * step)
        rows, columns = scaled.height // step, scaled.width // step
        if self.rule != "squares" and rows * columns > self.max_tokens:
            rows, columns = _within(rows, columns, self.max_tokens)
        return one_tile(Tile(box=whole(size), size=Size(rows * step, columns * step)))

    def arrange(
        self, size: Size, plan: ImagePlan, grids: Sequence[Grid]
    ) -> NDArray[np.int64] | None:
        """Put marks between the rows."""
        if self.layout == "plain":
            return None
        lines = with_row_ends(stitched(plan, grids[0], 0), _ROW_END)
        if self.layout == "row_ends":
            return lines
        return np.concatenate([[-1 - _BEGIN], lines, [-1 - _END]]).astype(np.int64)


def _smart(size: Size, step: int, least: int, most: int) -> Size:
    """Return the nearest multiples of `step`, scaled into the budget."""
    height, width = (round(pixels / step) * step for pixels in size)  # 0 for a thin strip
    area, cell = size.height * size.width, step * step
    if height * width > most * cell:
        shrink = math.sqrt(area / (most * cell))
        height, width = (max(step, math.floor(px / shrink / step) * step) for px in size)
    elif height * width < least * cell:
        grow = math.sqrt(least * cell / area)
        height, width = (math.ceil(px * grow / step) * step for px in size)
    return Size(height, width)


def _fit(size: Size, step: int, most: int) -> Size:
    """Return the largest size within the budget, found by halving an interval of scales."""

    def at(scale: float) -> Size:
        height, width = (max(step, math.ceil(px * scale / step) * step) for px in size)
        return Size(height, width)

    low, high = _FIT_PRECISION / 10, 100.0
    while high - low >= _FIT_PRECISION:
        middle = (low + high) / 2
        scaled = at(middle)
        if scaled.height // step * (scaled.width // step) <= most:
            low = middle
        else:
            high = middle
    return at(low)


def _padded(size: Size, step: int, box: Size) -> Tile:
    """Return the tile of a picture that is shrunk into the box, and padded to whole cells."""
    scaled = size
    if size.height > box.height or size.width > box.width:
        shrink = min(box.height / size.height, box.width / size.width)
        scaled = Size(*(max(1, int(pixels * shrink)) for pixels in size))
    rows, columns = (math.ceil(pixels / step) for pixels in scaled)
    return Tile(box=whole(size), size=Size(rows * step, columns * step), scaled=scaled)


def _within(rows: int, columns: int, most: int) -> tuple[int, int]:
    """Shrink a grid into the budget: both sides alike, and of a thin strip the longer one."""
    shrink = math.sqrt(most / (rows * columns))
    rows, columns = (max(1, math.floor(count * shrink)) for count in (rows, columns))
    return min(rows, max(1, most // columns)), min(columns, max(1, most // rows))
