"""Pictures of any number of channels: satellite bands, fluorescence, 16-bit medical slices.

A picture with other channels than red, green and blue is an array ``(height, width, channels)``,
in memory, in a file ``.npy``, or as the bytes of one. Values are kept as floats on the scale of
bytes, 0 to 255: 16 bits lose nothing. Nothing is unpickled.
"""

from __future__ import annotations

import io
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmlm.errors import ImageError
from mmlm.features import Size

_MAGIC = b"\x93NUMPY"
_PLAIN = (1, 3, 4)


class Planes:
    """A picture of any number of channels; cut and resized like a PIL picture.

    Shapes:
        values: float32 ``(height, width, channels)``, from 0 to 255
    """

    def __init__(self, values: NDArray[np.float32]) -> None:
        self.values = values
        self.height, self.width = values.shape[:2]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, in Pillow's order."""
        return self.width, self.height

    def crop(self, box: tuple[int, int, int, int]) -> Planes:
        """Return the part inside a box of left, top, right, bottom."""
        left, top, right, bottom = box
        return Planes(self.values[top:bottom, left:right])


def planes_size(source: Any) -> Size | None:
    """Return the size of an array that is no plain picture, from its header; None for the rest."""
    if isinstance(source, np.ndarray):
        is_plain = source.ndim == 2 or (source.ndim == 3 and source.shape[2] in _PLAIN)
        return None if is_plain or source.ndim != 3 else Size(*source.shape[:2])
    if not _is_array_file(source):
        return None
    shape = _opened(source).shape
    if len(shape) not in (2, 3):
        raise ImageError(f"An array of shape {shape} is no picture (height, width, channels).")
    return Size(*shape[:2])


def open_planes(source: Any, *, channels: int) -> Planes:
    """Open a picture of `channels` channels.

    Args:
        source: An array, a file ``.npy`` or its bytes: uint8, uint16, or floats from 0 to 1.
        channels: How many the encoder takes.

    Raises:
        ImageError: if it is no array, or has other channels.
    """
    if isinstance(source, np.ndarray):
        array: Any = source
    elif _is_array_file(source):
        array = _opened(source)
    else:
        raise ImageError(
            f"This encoder takes pictures of {channels} channels, and {str(source)[:100]!r} is a "
            f"plain picture. Give an array (height, width, {channels}) or a file .npy of one."
        )
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] != channels or not array.size:
        raise ImageError(
            f"An array of shape {array.shape} was given to an encoder of {channels} channels. "
            f"Expected (height, width, {channels}), channels last."
        )
    if array.dtype == np.uint8:
        return Planes(np.asarray(array, dtype=np.float32))
    if array.dtype == np.uint16:
        return Planes(np.asarray(array, dtype=np.float32) / 257.0)
    values = np.asarray(array, dtype=np.float32) if array.dtype.kind == "f" else None
    if values is None or not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
        raise ImageError(
            f"A picture of {array.dtype} must be uint8, uint16, or floats from 0 to 1. Scale it, "
            f"for example by the largest value that the sensor gives."
        )
    return Planes(values * 255.0)


def _is_array_file(source: Any) -> bool:
    if isinstance(source, bytes):
        return source.startswith(_MAGIC)
    return isinstance(source, str | os.PathLike) and os.fspath(source).endswith(".npy")


def _opened(source: Any) -> Any:
    """Return the array of a file without reading it, or that of bytes."""
    try:
        if isinstance(source, bytes):
            return np.load(io.BytesIO(source), allow_pickle=False)
        return np.load(source, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise ImageError(f"There is no picture at {source}. Check the path.") from None
    except (ValueError, OSError, EOFError) as error:
        raise ImageError(f"The array {str(source)[:100]!r} cannot be read: {error}.") from error
