"""What every reader promises, the table of readers, and which part of a file is meant.

A reader looks at the bytes and never at the name of a file. It tells the size from the header,
so that a picture that is too large is refused before it is decoded, and gives an upright RGB
picture. It imports its library when it is first needed.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from mmlm.config import PartConfig
from mmlm.errors import ImageError, MissingExtraError
from mmlm.features import Size
from mmlm.registry import Registry

_REFERENCE = re.compile(r"(?P<file>.+)#(?P<kind>page|frame)=(?P<number>\d{1,9})", re.DOTALL)


@dataclass(frozen=True)
class PictureFile:
    """A file on this machine, or its bytes.

    Args:
        content: The path or the bytes.
        number: Which of its frames or pages is meant, from 0.
    """

    content: Path | bytes
    number: int = 0

    def open(self) -> BinaryIO:
        """Open it for reading, at its beginning."""
        return io.BytesIO(self.content) if isinstance(self.content, bytes) else self._file()

    def _file(self) -> BinaryIO:
        assert isinstance(self.content, Path)
        return self.content.open("rb")


class ReaderConfig(PartConfig):
    """Base of the readers: how one kind of file becomes a picture."""

    def claims(self, file: BinaryIO) -> bool:
        """Whether the bytes of `file`, which stands at its beginning, are of this kind."""
        raise NotImplementedError

    def size(self, file: PictureFile) -> Size:
        """Return height and width in pixels from the header alone.

        Raises:
            ImageError: if there is no such page or frame.
            MissingExtraError: if the library is not installed.
        """
        raise NotImplementedError

    def image(self, file: PictureFile) -> Image.Image:
        """Return the picture in RGB; the errors are those of `size`."""
        raise NotImplementedError


picture_readers: Registry[ReaderConfig] = Registry("picture reader")
"""All readers; `image: {use: letterbox, read: {dicom: {window: [40, 400]}}}` sets one."""


@dataclass(frozen=True)
class Readers:
    """Every reader, with its settings.

    Args:
        by_name: The readers.
    """

    by_name: Mapping[str, ReaderConfig]

    def reader_of(self, file: PictureFile) -> ReaderConfig | None:
        """Return the reader that knows these bytes; None leaves them to Pillow."""
        with file.open() as opened:
            for reader in self.by_name.values():
                opened.seek(0)
                if reader.claims(opened):
                    return reader
        return None


def all_readers(settings: Mapping[str, Mapping[str, Any]] | None = None) -> Readers:
    """Return all readers.

    Args:
        settings: What `read:` of an image policy says, such as ``{"pdf": {"dpi": 100}}``.

    Raises:
        ConfigError: if a reader or a setting is unknown.
    """
    return _readers(json.dumps(settings, sort_keys=True) if settings else "{}")


@lru_cache(maxsize=64)
def _readers(settings: str) -> Readers:
    words: dict[str, dict[str, Any]] = json.loads(settings)
    given = {
        name: picture_readers[name].from_dict(values, origin=f"image.read.{name}")
        for name, values in words.items()
    }
    others = {name: picture_readers[name]() for name in picture_readers if name not in given}
    return Readers({**given, **others})


def split_reference(source: str | os.PathLike[str]) -> tuple[Path, int]:
    """Split ``scan.pdf#page=3`` or ``film.gif#frame=2`` into the file and a number from 0.

    Pages count from 1 and frames from 0, as viewers count them. A file whose own name ends
    like that is the file.

    >>> split_reference("a/report.pdf#page=3")
    (PosixPath('a/report.pdf'), 2)
    >>> split_reference("a/photo.jpg")
    (PosixPath('a/photo.jpg'), 0)
    """
    text = os.fspath(source)
    if "#" not in text:
        return Path(text), 0
    match = _REFERENCE.fullmatch(text)
    if match is None or Path(text).exists():
        return Path(text), 0
    number = int(match["number"]) - (match["kind"] == "page")
    if number < 0:
        raise ImageError(f"{text} names page 0; the first page is page 1.")
    return Path(match["file"]), number


def require(package: str, *, needed_for: str, extra: str) -> Any:
    """Import an optional package.

    Raises:
        MissingExtraError: naming the extra that brings it.
    """
    try:
        return import_module(package)
    except ModuleNotFoundError:
        raise MissingExtraError(package, needed_for=needed_for, extra=extra) from None


def refuse_number(number: int, count: int, what: str) -> None:
    """Raise if a file has fewer frames or pages than were asked for."""
    if number >= count:
        raise ImageError(f"The {what} number {number} was asked for; the file has {count}.")
