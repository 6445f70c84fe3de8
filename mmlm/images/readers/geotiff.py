"""The reader `geotiff`: rasters of satellites and aircraft, and TIFF of many channels, by rasterio.

Three bands become red, green and blue. It claims a TIFF that Pillow cannot show as it is: more
channels than a picture has, or colours of more than eight bits; and, where `bands` is set, every
TIFF with more than one channel. A georeferenced TIFF of ordinary colours needs no library.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image, TiffImagePlugin
from pydantic import Field, field_validator

from mmlm.errors import ImageError
from mmlm.features import Size
from mmlm.images.readers.base import (
    PictureFile,
    ReaderConfig,
    picture_readers,
    refuse_number,
    require,
)
from mmlm.images.readers.window import Array, between

_MARKS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_BITS, _PHOTOMETRIC, _SAMPLES, _EXTRA = 258, 262, 277, 338
_RGB, _CMYK, _YCBCR = 2, 5, 6
_LOW_PERCENT, _HIGH_PERCENT = 2.0, 98.0


@picture_readers.register("geotiff")
class GeoTiffConfig(ReaderConfig):
    """GeoTIFF, and TIFF with more than three channels or with colours of 16 bits and more."""

    bands: tuple[int, int, int] | None = None
    """The bands that become red, green and blue, counted from 1, such as [4, 3, 2] for natural
    colours of Sentinel-2; by default the first three, or the first where there are fewer."""

    range: Literal["spread"] | tuple[float, float] = Field(default="spread")
    """Which values are black and white: [0, 3000] is the same for all pictures; spread goes from
    the 2nd to the 98th percentile of each band and picture. Bytes stay as they are, unless a
    range is given."""

    @field_validator("bands")
    @classmethod
    def _counted_from_one(cls, value: tuple[int, int, int] | None) -> tuple[int, int, int] | None:
        if value is not None and min(value) < 1:
            raise ValueError("bands count from 1")
        return value

    def claims(self, file: BinaryIO) -> bool:
        """Read the first directory of a TIFF: how many channels of how many bits."""
        if file.read(4) not in _MARKS:
            return False
        file.seek(0)
        tags = _tags(file)
        samples = int(tags.get(_SAMPLES, 1))
        if samples == 1:
            return False
        return self.bands is not None or not _is_plain(tags, samples)

    def size(self, file: PictureFile) -> Size:
        """Return rows and columns from the header."""
        with self._opened(file) as raster:
            return Size(int(raster.height), int(raster.width))

    def image(self, file: PictureFile) -> Image.Image:
        """Read three bands and bring them to bytes."""
        with self._opened(file) as raster:
            wanted = self.bands or ((1, 2, 3) if raster.count >= 3 else (1, 1, 1))
            if max(wanted) > raster.count:
                raise ImageError(
                    f"Band {max(wanted)} was asked for (`image.read.geotiff.bands`); the file "
                    f"has {raster.count}."
                )
            bands = [_bytes_of(raster.read(band), raster.nodata, self.range) for band in wanted]
        return Image.fromarray(np.stack(bands, axis=-1))

    @contextmanager
    def _opened(self, file: PictureFile) -> Generator[Any]:
        rasterio = _rasterio()
        refuse_number(file.number, 1, "page")
        # Nothing beside the file may change what is in it, and no other format is tried.
        environment = rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR", GDAL_PAM_ENABLED="NO")
        with environment:
            if isinstance(file.content, bytes):
                with (
                    rasterio.MemoryFile(file.content) as memory,
                    memory.open(driver="GTiff") as raster,
                ):
                    yield raster
            else:
                with rasterio.open(file.content, driver="GTiff") as raster:
                    yield raster


def _rasterio() -> Any:
    """Import rasterio, which shall not complain of every picture that has no place on Earth."""
    rasterio = require("rasterio", needed_for="Opening a TIFF of these channels", extra="geo")
    warnings.filterwarnings("ignore", category=rasterio.errors.NotGeoreferencedWarning)
    return rasterio


def _tags(file: BinaryIO) -> dict[int, Any]:
    """Read the first directory; bytes that are none leave the file to Pillow's explanation."""
    try:
        head = file.read(8)
        if head[2:3] == b"+" or head[3:4] == b"+":
            head += file.read(8)
        directory = TiffImagePlugin.ImageFileDirectory_v2(head)
        file.seek(directory.next)
        directory.load(file)
        return {tag: directory[tag] for tag in (_BITS, _PHOTOMETRIC, _SAMPLES, _EXTRA)
                if tag in directory}  # fmt: skip
    except Exception:  # a broken directory raises anything at all
        return {}


def _is_plain(tags: dict[int, Any], samples: int) -> bool:
    """Whether Pillow shows all there is: grey with alpha, RGB, RGBA, CMYK, of eight bits."""
    bits = tags.get(_BITS, (1,))
    if max(bits) > 8:
        return False
    photometric = tags.get(_PHOTOMETRIC)
    if samples == 4:
        has_alpha = bool(set(tags.get(_EXTRA, ())) & {1, 2})
        return photometric == _CMYK or (photometric == _RGB and has_alpha)
    if samples == 3:
        return photometric in (_RGB, _YCBCR, 8)
    return samples == 2 and bool(tags.get(_EXTRA))


def _bytes_of(values: Array, nodata: float | None, limits: str | tuple[float, float]) -> Array:
    """Bring one band to bytes; where there are no data, it is black."""
    known = np.isfinite(values) if values.dtype.kind == "f" else np.ones(values.shape, dtype=bool)
    if nodata is not None:
        known &= values != nodata
    if isinstance(limits, tuple):
        low, high = limits
    elif values.dtype == np.uint8:
        low, high = 0.0, 255.0
    elif known.any():
        low, high = np.percentile(values[known], [_LOW_PERCENT, _HIGH_PERCENT]).tolist()
    else:
        low, high = 0.0, 1.0
    shown = between(np.where(known, values, low).astype(np.float64), low, high)
    return np.where(known, shown, 0).astype(np.uint8)
