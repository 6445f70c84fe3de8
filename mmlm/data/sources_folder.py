"""A folder of pictures with captions, in the two ways in which people keep them.

    photos/a.jpg, photos/a.txt              a text file beside every picture
    photos/metadata.jsonl (or .csv)         one row for each picture: file_name, text, …

The second is the ImageFolder of `datasets`; its rows may have any shape that files have. Of the
first only the names are held, in one block of bytes. Pictures and texts are opened when they
are asked for.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from mmlm.data.base import Source, sources
from mmlm.data.schema import BadRowError, Sample
from mmlm.data.sources_files import CsvConfig, JsonLinesConfig, find_local
from mmlm.data.sources_rows import Columns, RowReader, RowsConfig
from mmlm.errors import DataError

SUFFIXES = (
    ".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".png", ".ppm", ".tga", ".tif", ".tiff",
    ".webp",
)  # fmt: skip
"""Files of these endings are pictures."""

_METADATA = ("metadata.jsonl", "metadata.csv")
_METADATA_COLUMNS = Columns(image="file_name", answer="text")
_CAPTIONS_HASHED = 512


class CaptionFolder(Source):
    """Pictures with a text file beside each.

    Args:
        name: The name for logs and counts.
        folder: Where the pictures are, in folders of folders too.
        reader: Turns values into a sample.
        suffix: The ending of the text files.
    """

    def __init__(self, name: str, folder: Path, reader: RowReader, *, suffix: str) -> None:
        self.name = name
        self._folder, self._reader, self._suffix = folder, reader, suffix
        names = [os.fsencode(path) for path in sorted(_pictures(folder))]
        self._names = b"".join(names)
        self._ends = np.cumsum([len(name) for name in names], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def _picture(self, row: int) -> str:
        start = int(self._ends[row - 1]) if row else 0
        return os.fsdecode(self._names[start : int(self._ends[row])])

    def sample(self, row: int) -> Sample:
        """Read the caption of one picture."""
        name = self._picture(row)
        caption = self._folder / Path(name).with_suffix(self._suffix)
        try:
            text = caption.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadRowError("bad_unicode", f"{caption.name}: {error}") from None
        except OSError as error:
            raise BadRowError("no_caption", f"{caption}: {error.strerror}") from None
        columns = self._reader.columns
        values = {columns.id: name, columns.image: name, columns.answer: text.strip()}
        return self._reader.read(values, number=row, source=self.name, folder=self._folder)

    def fingerprint(self) -> str:
        """Return a hash of all names and of captions spread evenly over the folder."""
        digest = hashlib.sha256(self._names)
        for row in range(0, len(self), max(1, len(self) // _CAPTIONS_HASHED)):
            caption = self._folder / Path(self._picture(row)).with_suffix(self._suffix)
            digest.update(caption.read_bytes() if caption.is_file() else b"\0")
        return f"{len(self)}-{digest.hexdigest()[:16]}"


@sources.register("folder")
class FolderConfig(RowsConfig):
    """Pictures with captions: `a.jpg` beside `a.txt`, or `metadata.jsonl` as in ImageFolder."""

    path: str = Field(min_length=1)
    """The folder, relative to the recipe that names it."""

    suffix: str = Field(default=".txt", pattern=r"^\.\w+$")
    """The ending of the text files; not used where there is a metadata file."""

    def open(self, folder: Path) -> Source:
        """Find the metadata file, or list the pictures."""
        place = find_local(self.path, folder)
        if not place.is_dir():
            raise DataError(f"There is no folder {place}. Check `path` in the data recipe.")
        for name in _METADATA:
            if (place / name).is_file():
                return self._of_metadata(place / name)
        source = CaptionFolder(self._title(place), place, self.reader(), suffix=self.suffix)
        if not len(source):
            held = ", ".join(sorted(path.name for path in place.iterdir())[:5]) or "nothing"
            raise DataError(
                f"{place} holds no picture ({', '.join(SUFFIXES)}) and no {_METADATA[0]}; it holds "
                f"{held}. Name the folder that the pictures are in."
            )
        return source

    def _of_metadata(self, path: Path) -> Source:
        words: dict[str, Any] = self.to_dict()
        if self.columns == Columns():
            words["columns"] = _METADATA_COLUMNS.to_dict()
        words = {key: words[key] for key in RowsConfig.model_fields}
        config = JsonLinesConfig if path.suffix == ".jsonl" else CsvConfig
        words |= {"path": str(path), "name": self._title(path.parent)}
        return config.from_dict(words, origin=str(path)).open(path.parent)

    def _title(self, place: Path) -> str:
        return self.name or place.name


def _pictures(folder: Path, below: str = "") -> Iterator[str]:
    """List the pictures in a folder and its folders; hidden ones are none."""
    with os.scandir(folder / below) as entries:
        for entry in entries:
            name = f"{below}{entry.name}"
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _pictures(folder, f"{name}/")
            elif entry.name.lower().endswith(SUFFIXES):
                yield name
