"""Pictures of what a model saw: its tiles, its tokens, and where an answer looked.

    generation.look, an image policy ──► seen ──► a picture for the page
                                         you are here

The places of tokens follow from the image policy and the grids of the parts, by sizes alone.
Where a connector gives tokens that have no place (a resampler), only the tiles are drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from mmlm.errors import MMLMError
from mmlm.features import Grid, Size
from mmlm.images import open_image

_SIDE_PX = 768
_LINE = (31, 109, 91)
_COLD, _WARM = np.array([20.0, 24.0, 60.0]), np.array([255.0, 176.0, 32.0])


@dataclass(frozen=True)
class SeenTile:
    """One tile: where it lies in the source picture, and its tokens."""

    box: tuple[float, float, float, float]
    """Left, top, right, bottom in source pixels; may lie outside of the picture in part."""

    grid: Grid

    @property
    def has_places(self) -> bool:
        """Whether its tokens stand for places."""
        return self.grid.rows > 1 or self.grid.num_tokens == 1


def tiles_of(counter: Any, size: Size) -> list[SeenTile]:
    """Return the tiles of a picture of this size, in the order in which they are read.

    Args:
        counter: The `TokenCounter` of a processor.
        size: Height and width of the picture.
    """
    tiles: list[SeenTile] = []
    for tile in counter.plan(size).tiles:
        left, top, right, bottom = tile.box
        scaled = tile.scaled or tile.size
        across, down = (right - left) / scaled.width, (bottom - top) / scaled.height
        x, y = left + tile.at[1] * across, top + tile.at[0] * down
        box = (x, y, x + tile.size.width * across, y + tile.size.height * down)
        tiles.append(SeenTile(box, counter.grid_of_tile(tile.size)))
    return tiles


def draw_grid(picture: Any, counter: Any) -> tuple[Image.Image, str]:
    """Draw tiles and tokens over a picture; returns it, and a line that says the same."""
    image = open_image(picture)
    tiles = tiles_of(counter, Size(image.height, image.width))
    shown, scale = _shrunk(image)
    draw = ImageDraw.Draw(shown)
    for tile in tiles:
        left, top, right, bottom = (side * scale for side in tile.box)
        if tile.has_places:
            for row in range(1, tile.grid.rows):
                y = top + (bottom - top) * row / tile.grid.rows
                draw.line((left, y, right, y), fill=_LINE)
            for column in range(1, tile.grid.columns):
                x = left + (right - left) * column / tile.grid.columns
                draw.line((x, top, x, bottom), fill=_LINE)
        draw.rectangle((left, top, right - 1, bottom - 1), outline=_LINE, width=3)
    return shown, describe(tiles)


def describe(tiles: list[SeenTile]) -> str:
    """Say how many tiles and tokens a picture has.

    >>> describe([SeenTile((0, 0, 8, 8), Grid(1, 4, 4)), SeenTile((8, 0, 16, 8), Grid(1, 4, 4))])
    '32 tokens: 2 tiles of 4 × 4'
    """
    total = sum(tile.grid.num_tokens for tile in tiles)
    kinds: dict[str, int] = {}
    for tile in tiles:
        places = f"{tile.grid.rows} × {tile.grid.columns}" if tile.has_places else "no places"
        kinds[places] = kinds.get(places, 0) + 1
    parts = [f"{number} tile{'s' if number > 1 else ''} of {k}" for k, number in kinds.items()]
    return f"{total} tokens: {', '.join(parts)}"


def draw_heat(picture: Any, counter: Any, heat: np.ndarray[Any, Any]) -> Image.Image:
    """Lay a map of attention over a picture: dark where least was looked at, warm where most.

    Shapes:
        heat: ``(image_tokens,)``, those of this picture in reading order

    Raises:
        MMLMError: if the tokens have no places.
    """
    image = open_image(picture)
    tiles = tiles_of(counter, Size(image.height, image.width))
    if not all(tile.has_places for tile in tiles):
        raise MMLMError(
            "The connector of this model gives tokens that stand for no place of the picture, so "
            "there is no map of them."
        )
    shown, scale = _shrunk(image)
    field = np.zeros((shown.height, shown.width))
    start = 0
    for tile in tiles:
        grid, end = tile.grid, start + tile.grid.num_tokens
        cells = heat[start:end].reshape(grid.frames, grid.rows, grid.columns).mean(0)
        start = end
        _lay(field, cells, tuple(side * scale for side in tile.box))
    field -= field.min()  # a map of differences; how large they are stands in its caption
    field /= field.max() or 1.0
    mixed = _COLD + (_WARM - _COLD) * field[..., None]
    pixels = np.asarray(shown, dtype=np.float64)
    return Image.fromarray(np.round(0.45 * pixels + 0.55 * mixed).astype(np.uint8))


def _lay(field: np.ndarray[Any, Any], cells: np.ndarray[Any, Any], box: Any) -> None:
    """Put the cells of a tile into a field, where the greatest value stays."""
    left, top, right, bottom = (round(side) for side in box)
    if right <= left or bottom <= top:
        return
    smooth = Image.fromarray(cells.astype(np.float32)).resize(
        (right - left, bottom - top), Image.Resampling.BILINEAR
    )
    height, width = field.shape
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
    inside = np.asarray(smooth)[y0 - top : y1 - top, x0 - left : x1 - left]
    np.maximum(field[y0:y1, x0:x1], inside, out=field[y0:y1, x0:x1])


def _shrunk(image: Image.Image) -> tuple[Image.Image, float]:
    """Bring a picture to a size for the page; returns it and the factor."""
    scale = _SIDE_PX / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size), scale
