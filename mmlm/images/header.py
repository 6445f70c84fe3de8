"""The size of a JPEG or PNG from its first bytes, for planning a million of them.

Pillow opens a picture in full readiness to decode it, which costs ten times what the size does.
What is read here is what Pillow would say; whatever is unusual - another format, markers that do
not fit, numbers that Pillow refuses, a picture that lies on its side - is left to `read_size`,
by returning None.
"""

from __future__ import annotations

import os
import struct

from mmlm.features import Size

_FIRST_BYTES = 1 << 12
_MOST_BYTES = 1 << 18
_PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
_EXIF = b"Exif\x00\x00"
_ORIENTATION = 0x0112
_FRAMES = frozenset({0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF})


def quick_size(path: str) -> tuple[Size | None, int]:
    """Read the size of a picture as it is shown, and the length of its file in bytes.

    Returns:
        None for the size where only `read_size` can tell.

    Raises:
        OSError: if there is no such file.
    """
    file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        length = os.fstat(file).st_size
        data = os.read(file, _FIRST_BYTES)
        size, needed = size_of_bytes(data)
        if size is None and needed > len(data) and length > len(data):
            data += os.read(file, _MOST_BYTES)
            size, _ = size_of_bytes(data)
        return size, length
    except OSError:  # a folder, for example, which `read_size` explains
        return None, 0
    finally:
        os.close(file)


def size_of_bytes(data: bytes) -> tuple[Size | None, int]:
    """Read the size out of the beginning of a file.

    Returns:
        The size or None, and how many bytes would be needed to know more.
    """
    if data.startswith(_PNG) and len(data) >= 33:
        width, height = struct.unpack_from(">II", data, 16)
        # An orientation may stand in a chunk before the pixels.
        end = data.find(b"IDAT")
        plain = end >= 0 and data.find(b"eXIf", 0, end) < 0
        return (Size(height, width) if plain else None), 0
    if data.startswith(b"\xff\xd8\xff"):
        return _size_of_jpeg(data)
    return None, 0


def _size_of_jpeg(data: bytes) -> tuple[Size | None, int]:
    """Go from marker to marker up to the frame header."""
    position = 2
    while position + 9 <= len(data):
        if data[position] != 0xFF:
            return None, 0
        marker = data[position + 1]
        length = data[position + 2] << 8 | data[position + 3]
        if marker in _FRAMES:
            height = data[position + 5] << 8 | data[position + 6]
            width = data[position + 7] << 8 | data[position + 8]
            return Size(height, width), 0
        if marker == 0xE1 and data.startswith(_EXIF, position + 4):
            if position + 2 + length > len(data):
                return None, position + 2 + length
            if not _is_upright(data[position + 10 : position + 2 + length]):
                return None, 0
        # Only segments with a length stand before the frame; XMP may hold an orientation too.
        elif marker in (0xFF, 0xD8, 0xD9, 0xDA) or length < 2 or marker == 0xE1:
            return None, 0
        position += 2 + length
    return None, position + 9


def _is_upright(tiff: bytes) -> bool:
    """Whether a block of EXIF plainly says that height and width stay as they are."""
    order = {b"II*\x00": "<", b"MM\x00*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 14:
        return False
    (start,) = struct.unpack_from(f"{order}I", tiff, 4)
    if start + 2 > len(tiff):
        return False
    (count,) = struct.unpack_from(f"{order}H", tiff, start)
    if start + 2 + 12 * count > len(tiff):
        return False
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind, number, value = struct.unpack_from(f"{order}HHIH", tiff, entry)
        if tag == _ORIENTATION and ((kind, number) != (3, 1) or value not in (1, 2, 3, 4)):
            return False
    return True
