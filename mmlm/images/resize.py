"""From a picture and a tile to the uint8 pixels of that tile.

Resizing is `torch.nn.functional.interpolate` on uint8 with antialiasing: bit for bit what the
torchvision-backed image processors of transformers compute. It runs row pass first, then
column pass, and each pass in strips, which changes no bit and keeps the memory of a long
picture, padded to a square, in the megabytes. Only where the square would hold more than 64
megapixels is the picture shrunk beforehand.

Only `normalise` knows floats; nothing here opens a file or chooses a tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from mmlm.errors import ConfigError
from mmlm.features import Size
from mmlm.images.base import Tile
from mmlm.images.planes import Planes

RESAMPLE = ("bilinear", "bicubic", "lanczos", "nearest-exact")
"""The names that `resample` takes."""

_STRIP_PIXELS = 16 * 2**20
_SCALED_PIXELS = 64 * 2**20


class _Margins(NamedTuple):
    """How far a box reaches beyond the picture on each side, in source pixels."""

    left: int
    top: int
    right: int
    bottom: int


def cut(
    image: Image.Image | Planes,
    tile: Tile,
    *,
    resample: str = "bicubic",
    fill: tuple[int, ...] = (0, 0, 0),
) -> Tensor:
    """Cut one tile out of a picture.

    Args:
        image: An RGB picture, as `decode.open_image` gives it.
        tile: Where to cut, and the size to return.
        resample: One of `RESAMPLE`.
        fill: The colour of what lies outside the picture.

    Returns:
        uint8, ``(3, tile.size.height, tile.size.width)``.
    """
    return next(_cuts(image, (tile,), resample=resample, fill=fill))


def cut_each(
    image: Image.Image | Planes,
    tiles: Sequence[Tile],
    *,
    resample: str = "bicubic",
    fill: tuple[int, ...] = (0, 0, 0),
) -> list[Tensor]:
    """Cut tiles of any sizes; windows of the same resized box share the work."""
    return list(_cuts(image, tiles, resample=resample, fill=fill))


def _cuts(
    image: Image.Image | Planes, tiles: Sequence[Tile], *, resample: str, fill: tuple[int, ...]
) -> Iterator[Tensor]:
    """Cut one tile after another; only the last resized box is held."""
    if resample not in RESAMPLE:
        raise ConfigError(
            f"No resampling is named {resample!r}. Known: {', '.join(RESAMPLE)}. It comes from "
            f"the encoder's facts; set `vision.resample` to another."
        )
    if isinstance(image, Planes) and len(fill) != image.values.shape[2]:
        fill = fill[:1] * image.values.shape[2]  # grey, in as many channels
    held: tuple[tuple[int, int, int, int], Size] | None = None
    pixels = torch.empty(0)
    for tile in tiles:
        scaled = tile.scaled or tile.size
        if scaled.height * scaled.width > _SCALED_PIXELS and scaled != tile.size:
            small = _window_in_source(tile, scaled)
            yield _resize_box(image, small.box, small.size, resample=resample, fill=fill)
            continue
        if held != (tile.box, scaled):
            pixels = _resize_box(image, tile.box, scaled, resample=resample, fill=fill)
            held = (tile.box, scaled)
        top, left = tile.at
        window = (left, top, left + tile.size.width, top + tile.size.height)
        yield _crop_or_fill(pixels, window, fill)


def cut_all(
    image: Image.Image | Planes,
    tiles: Sequence[Tile],
    *,
    resample: str = "bicubic",
    fill: tuple[int, ...] = (0, 0, 0),
) -> Tensor:
    """Cut tiles of one size: uint8, ``(tiles, 3, height, width)``."""
    return torch.stack(cut_each(image, tiles, resample=resample, fill=fill))


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Turn bytes into what the encoder was trained on: ``(pixels / 255 - mean) / std``.

    Scale and offset are folded into one subtraction and one division, as the image processors
    of transformers do, so that the result equals theirs to the last bit.

    Shapes:
        pixels:  uint8, or floats on the same scale, ``(..., channels, height, width)``
        returns: float32 of the same shape
    """
    offset = torch.tensor(mean, dtype=torch.float32, device=pixels.device) * 255.0
    scale = torch.tensor(std, dtype=torch.float32, device=pixels.device) * 255.0
    # Planes are contiguous first: what is cut out of interleaved bytes takes three times as long.
    values = pixels.contiguous().to(torch.float32)
    values = values.clone() if values.data_ptr() == pixels.data_ptr() else values
    return values.sub_(offset[:, None, None]).div_(scale[:, None, None])


def mean_fill(mean: Sequence[float]) -> tuple[int, int, int]:
    """Return the encoder's mean as a colour, rounded down as `LlavaImageProcessor` does it."""
    red, green, blue = (int(value * 255) for value in mean)
    return red, green, blue


def _window_in_source(tile: Tile, scaled: Size) -> Tile:
    """Return the tile whose box is just the window, to the nearest source pixel.

    Only for pictures so long that the resized box would fill the memory.
    """
    left, top, right, bottom = tile.box
    across, down = (right - left) / scaled.width, (bottom - top) / scaled.height
    window_top, window_left = tile.at
    box_left = left + round(window_left * across)
    box_top = top + round(window_top * down)
    box_right = max(box_left + 1, left + round((window_left + tile.size.width) * across))
    box_bottom = max(box_top + 1, top + round((window_top + tile.size.height) * down))
    return Tile(box=(box_left, box_top, box_right, box_bottom), size=tile.size)


def _resize_box(
    image: Image.Image | Planes,
    box: tuple[int, int, int, int],
    size: Size,
    *,
    resample: str,
    fill: tuple[int, ...],
) -> Tensor:
    """Resize one box, which may reach beyond the picture, to `size`."""
    left, top, right, bottom = box
    inside = (max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height))
    if inside[0] >= inside[2] or inside[1] >= inside[3]:
        return _colour(fill, image).expand(-1, *size).contiguous()
    margins = _Margins(inside[0] - left, inside[1] - top, right - inside[2], bottom - inside[3])
    pixels = _as_tensor(image if inside == (0, 0, *image.size) else image.crop(inside))
    if any(margins):
        pixels, margins = _bounded(pixels, margins, resample)
    elif pixels.shape[1] * pixels.shape[2] <= _STRIP_PIXELS:
        return _interpolate(pixels, size, resample)
    narrow = _squeeze_rows(pixels, margins, size.width, resample, fill)
    beyond = _colour(fill, image).expand(-1, 1, pixels.shape[2])
    beyond = _squeeze_rows(beyond, margins, size.width, resample, fill)
    return _squeeze_columns(narrow, beyond, margins, size.height, resample)


def _squeeze_rows(
    pixels: Tensor, margins: _Margins, width: int, resample: str, fill: tuple[int, ...]
) -> Tensor:
    """Resize the rows, with their margins, to `width`, a few rows at a time."""
    right = pixels.shape[2] + margins.right
    strips = pixels.split(_strip(margins.left + right), dim=1)
    done = [
        _interpolate(
            _crop_or_fill(strip, (-margins.left, 0, right, strip.shape[1]), fill),
            Size(strip.shape[1], width),
            resample,
        )
        for strip in strips
    ]
    return torch.cat(done, dim=1)


def _squeeze_columns(
    pixels: Tensor, beyond: Tensor, margins: _Margins, height: int, resample: str
) -> Tensor:
    """Resize the columns, with rows like `beyond` above and below, a few columns at a time."""
    columns = _strip(margins.top + pixels.shape[1] + margins.bottom)
    done: list[Tensor] = []
    for strip, row in zip(pixels.split(columns, dim=2), beyond.split(columns, dim=2), strict=True):
        above, below = (row.expand(-1, rows, -1) for rows in (margins.top, margins.bottom))
        tall = torch.cat([above, strip, below], dim=1)
        done.append(_interpolate(tall, Size(height, strip.shape[2]), resample))
    return torch.cat(done, dim=2)


def _bounded(pixels: Tensor, margins: _Margins, resample: str) -> tuple[Tensor, _Margins]:
    """Shrink a strip whose box, margins included, would cost seconds to walk through.

    A picture of 1 x 65,535 pixels would be padded to 4 gigapixels. Anything less extreme than
    8,192 x 8,192 with its margins is left alone, and stays equal to the stock processors.
    """
    height, width = pixels.shape[1:]
    area = (margins.top + height + margins.bottom) * (margins.left + width + margins.right)
    if area <= _SCALED_PIXELS:
        return pixels, margins
    factor = (_SCALED_PIXELS / area) ** 0.5
    size = Size(max(1, round(height * factor)), max(1, round(width * factor)))
    shrunk = _Margins(*(round(margin * factor) for margin in margins))
    return _interpolate(pixels, size, resample), shrunk


def _strip(length: int) -> int:
    """How many lines of `length` pixels are worked on at once."""
    return max(1, _STRIP_PIXELS // length)


def _interpolate(pixels: Tensor, size: Size, resample: str) -> Tensor:
    """Resize ``(channels, height, width)``, bytes or floats on their scale."""
    if pixels.shape[1:] == size:
        return pixels
    if resample == "lanczos" and not _torch_has_lanczos():
        return _lanczos_by_pillow(pixels, size)
    batch = pixels[None].contiguous(memory_format=torch.channels_last)  # the fast path
    smooth = resample != "nearest-exact"
    done = functional.interpolate(batch, size=tuple(size), mode=resample, antialias=smooth)[0]
    return done.clamp_(0, 255) if done.is_floating_point() else done


@cache
def _torch_has_lanczos() -> bool:
    """Whether this PyTorch knows the mode; 2.11 does not."""
    try:
        functional.interpolate(
            torch.zeros(1, 3, 4, 4, dtype=torch.uint8), size=(2, 2), mode="lanczos", antialias=True
        )
    except (ValueError, NotImplementedError):
        return False
    return True


def _lanczos_by_pillow(pixels: Tensor, size: Size) -> Tensor:
    """Resize each channel as Pillow does: rows first, then columns, as PyTorch does it."""
    shape = (size.width, size.height)
    planes = [
        np.array(Image.fromarray(plane.numpy()).resize(shape, Image.Resampling.LANCZOS))
        for plane in pixels
    ]
    done = torch.from_numpy(np.stack(planes))
    return done.clamp_(0, 255) if done.is_floating_point() else done


def _crop_or_fill(pixels: Tensor, box: tuple[int, int, int, int], fill: tuple[int, ...]) -> Tensor:
    """Cut a box out of ``(3, height, width)``; what lies outside gets the fill colour."""
    left, top, right, bottom = box
    height, width = pixels.shape[1:]
    if left >= 0 and top >= 0 and right <= width and bottom <= height:
        return pixels[:, top:bottom, left:right]
    colour = torch.tensor(fill, dtype=pixels.dtype)[:, None, None]
    canvas = colour.repeat(1, bottom - top, right - left)
    inside = pixels[:, max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
    row, column = max(-top, 0), max(-left, 0)
    canvas[:, row : row + inside.shape[1], column : column + inside.shape[2]] = inside
    return canvas


def _colour(fill: tuple[int, ...], image: Image.Image | Planes) -> Tensor:
    """Return a colour as ``(channels, 1, 1)``, in the type of the picture's numbers."""
    dtype = torch.float32 if isinstance(image, Planes) else torch.uint8
    return torch.tensor(fill, dtype=dtype)[:, None, None]


def _as_tensor(image: Image.Image | Planes) -> Tensor:
    """Return the numbers of a picture as ``(channels, height, width)``."""
    values = image.values if isinstance(image, Planes) else np.array(image)
    return torch.from_numpy(np.ascontiguousarray(values)).permute(2, 0, 1)
