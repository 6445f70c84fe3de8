"""Pictures as a benchmark holds them: a path, bytes, base64, or what `datasets` makes of them.

A picture stays a reference until it is shown; its key is a hash of its bytes, so that a
changed picture is another picture, and equal pictures in two files are one.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from io import BytesIO
from pathlib import Path
from typing import Any

from mmlm.errors import DataError, ImageError
from mmlm.images import clip_facts, evenly, open_frames, split_reference
from mmlm.messages import Clip
from mmlm.storage import cache_folder, sha256_of_file, write_atomic

_LONGEST_PATH = 1024
_FRAME_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
_FILM_ENDINGS = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".gif")


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
    """Return frames of a video, evenly spread, in their order.

    A video is a folder of pictures, or a film (`mmlm[video]`), whose frames are cut out once and
    kept in the cache of MMLM by the film's bytes.

    Args:
        name: The folder of the frames, which follow one another by name; or the film, with or
            without the end of its name.
        folders: Where relative paths may begin.
        count: How many; all where there are fewer.

    Raises:
        DataError: if there is neither, or nothing in it.
    """
    folder = next((base / name for base in folders if (base / name).is_dir()), None)
    if folder is None:
        return _cut(_find_film(name, folders), count)
    frames = sorted(path for path in folder.iterdir() if path.suffix.lower() in _FRAME_ENDINGS)
    if not frames:
        raise DataError(f"{folder} holds no frames ({', '.join(_FRAME_ENDINGS)})")
    return [frames[place] for place in evenly(len(frames), min(count, len(frames)))]


def _find_film(name: str, folders: list[Path]) -> Path:
    for base in folders:
        for ending in ("", *_FILM_ENDINGS):
            path = base / f"{name}{ending}"
            if path.is_file():
                return path
    raise DataError(
        f"there is no folder {folders[0] / name} with the frames of the video, and no film of that "
        f"name ({', '.join(_FILM_ENDINGS)})"
    )


def _cut(film: Path, count: int) -> list[Path]:
    """Cut frames out of a film, or find those that were cut before."""
    clip = Clip(film)
    try:
        there = clip_facts(clip).num_frames
        chosen = evenly(there, min(count, there))
        folder = cache_folder("frames") / sha256_of_file(film)[:32]
        paths = [folder / f"{number:06d}.png" for number in chosen]
        if not all(path.is_file() for path in paths):
            folder.mkdir(exist_ok=True)
            for path, frame in zip(paths, open_frames(clip, chosen), strict=True):
                written = BytesIO()
                frame.save(written, "PNG")
                write_atomic(path, written.getvalue())
    except (ImageError, OSError) as error:
        raise DataError(f"the film {film} gives no frames: {error}") from None
    return paths


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
