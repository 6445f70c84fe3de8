"""Pictures as a benchmark holds them: a path, bytes, base64, or what `datasets` makes of them.

A picture stays a reference until it is shown; its key is a hash of its bytes, so that a
changed picture is another picture, and equal pictures in two files are one.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from pathlib import Path
from typing import Any

from mmlm.errors import DataError
from mmlm.images import split_reference

_LONGEST_PATH = 1024
_FRAME_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


def find_picture(value: Any, folders: list[Path]) -> Path | bytes | Any:
    """Turn what stands in a row into a path, bytes or a PIL image.

    Args:
        value: A path, base64 text, bytes, ``{"bytes": …, "path": …}``, or a PIL image.
        folders: Where relative paths may begin; the first that holds the file wins.

    Raises:
        DataError: if it is none of them, or there is no such file.
    """
    if isinstance(value, dict) and ("bytes" in value or "path" in value):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes | bytearray) and value:
        return bytes(value)
    if hasattr(value, "convert") and hasattr(value, "size"):
        return value
    if not isinstance(value, str | Path) or not str(value):
        raise DataError(f"no picture (got {value!r:.60})")
    if isinstance(value, str) and len(value) > _LONGEST_PATH:
        try:
            return base64.b64decode(value, validate=True)
        except binascii.Error:
            raise DataError("its picture is neither a path nor base64") from None
    if str(value).startswith(("http://", "https://")):
        raise DataError(f"its picture is a URL ({value}); fetch it first, no benchmark does")
    for folder in folders:
        path = folder / value
        if path.is_file() or split_reference(path)[0].is_file():
            return path
    raise DataError(f"there is no file {folders[0] / value}")


def find_frames(name: str, folders: list[Path], count: int) -> list[Path]:
    """Return frames of a video that was cut into pictures, evenly spread, in their order.

    Args:
        name: The folder of the frames; they follow one another by name.
        folders: Where relative paths may begin.
        count: How many; all where there are fewer.

    Raises:
        DataError: if there is no such folder, or nothing in it.
    """
    folder = next((base / name for base in folders if (base / name).is_dir()), None)
    if folder is None:
        raise DataError(
            f"there is no folder {folders[0] / name} with the frames of the video; cut it into "
            f"pictures first, one folder for each video"
        )
    frames = sorted(path for path in folder.iterdir() if path.suffix.lower() in _FRAME_ENDINGS)
    if not frames:
        raise DataError(f"{folder} holds no frames ({', '.join(_FRAME_ENDINGS)})")
    if len(frames) <= count:
        return frames
    # The middle of each of `count` equal parts.
    return [frames[(2 * part + 1) * len(frames) // (2 * count)] for part in range(count)]


def picture_key(picture: Any) -> str:
    """Return a hash of the picture's bytes.

    Raises:
        DataError: if the file cannot be read.
    """
    digest = hashlib.sha256()
    if isinstance(picture, Path):
        try:
            file, number = split_reference(picture)
            digest.update(file.read_bytes())
            digest.update(f"#{number}".encode() if number else b"")
        except OSError as error:
            raise DataError(f"the picture {picture} cannot be read: {error}") from None
    elif isinstance(picture, bytes):
        digest.update(picture)
    else:
        digest.update(f"{picture.mode} {picture.size}".encode())
        digest.update(picture.tobytes())
    return digest.hexdigest()[:32]
