"""Tiny shards, tables and pictures for the tests of sources."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image

from mmlm.data import BadRowError, sources
from mmlm.messages import Text


def png(number: int = 0, side: int = 8) -> bytes:
    """The bytes of a small picture of one colour."""
    stream = io.BytesIO()
    colour = (number % 256, number // 256 % 256, 90)
    Image.new("RGB", (side, side), colour).save(stream, "PNG")
    return stream.getvalue()


def open_source(folder: Path, **words: Any) -> Any:
    return sources.read(words, origin="data").open(folder)


def write_tar(path: Path, files: dict[str, bytes | str], **settings: Any) -> Path:
    """Write an archive of files in the order given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **settings) as archive:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def captions(first: int, count: int) -> dict[str, bytes | str]:
    """Members of an archive: pictures with captions that say their number."""
    files: dict[str, bytes | str] = {}
    for number in range(first, first + count):
        files[f"{number:06d}.png"] = png(number)
        files[f"{number:06d}.txt"] = f"number {number}"
    return files


def write_tars(folder: Path, sizes: list[int]) -> Path:
    """Write archives of captions with running numbers."""
    first = 0
    for index, size in enumerate(sizes):
        write_tar(folder / f"{index:03d}.tar", captions(first, size))
        first += size
    return folder


def content(sample: Any) -> list[tuple[str, ...]]:
    """The turns as short tuples; images as their last name, or as the number of their bytes."""
    return [(m.role, *map(_part, m.content)) for m in sample.messages]


def _part(part: Any) -> str:
    if isinstance(part, Text):
        return part.text
    if isinstance(part.image, bytes):
        return f"[{len(part.image)} bytes]"
    return f"[{part.image.rsplit('/', 1)[-1]}]"


def answer(source: Any, row: int) -> str:
    """The answer of a row, or the cause for which it was refused."""
    try:
        return source.sample(row).messages[-1].text
    except BadRowError as error:
        return error.cause


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path
