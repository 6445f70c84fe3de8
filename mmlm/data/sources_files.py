"""Sources that are files on this machine: JSON lines, one JSON array, and CSV.

Each opens in one pass that only finds where the rows begin (`sources_index`); a row is
read, parsed and shaped (`sources_rows`) when it is asked for. Paths are relative to the
recipe that names them, image paths to the data file.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mmlm.data.base import Source, sources
from mmlm.data.order import key_of
from mmlm.data.schema import BadRowError, Sample
from mmlm.data.sources_index import RowFile, index_csv, index_json, index_lines, parse_json
from mmlm.data.sources_rows import RowReader, RowsConfig
from mmlm.errors import DataError

csv.field_size_limit(1 << 27)


class FileSource(Source):
    """The rows of one file.

    Args:
        name: The name for logs and counts.
        rows: Where each row stands.
        parse: Turns the bytes of a row into values.
        reader: Turns values into a sample.
        unique_ids: Refuse rows whose id an earlier row has; costs one pass over the file.
    """

    def __init__(
        self,
        name: str,
        rows: RowFile,
        parse: Callable[[bytes], Any],
        reader: RowReader,
        *,
        unique_ids: bool = False,
    ) -> None:
        self.name = name
        self._rows, self._parse, self._reader = rows, parse, reader
        self._folder = rows.path.parent
        self._repeats = repeated(map(self._id, range(len(rows)))) if unique_ids else None

    def _id(self, row: int) -> Any:
        try:
            values = self._parse(self._rows.read(row))
        except BadRowError:
            return None
        return values.get(self._reader.columns.id) if isinstance(values, dict) else None

    def __len__(self) -> int:
        return len(self._rows)

    def sample(self, row: int) -> Sample:
        """Read, parse and shape one row."""
        values = self._parse(self._rows.read(row))
        refuse_repeated(self._repeats, row)
        return self._reader.read(values, number=row, source=self.name, folder=self._folder)

    def fingerprint(self) -> str:
        """Return what the file is, by content."""
        return self._rows.fingerprint()


class FileConfig(RowsConfig):
    """What the sources that are files have in common."""

    path: str = Field(min_length=1)
    """The data file, relative to the recipe that names it."""

    unique_ids: bool = False
    """Drop and count rows whose id an earlier row has. It costs one pass over the rows when the
    source is opened; otherwise rows may share an id."""

    def locate(self, folder: Path) -> Path:
        """Find the data file beside the recipe, or from the current directory."""
        path = find_local(self.path, folder)
        if path.is_dir():
            raise DataError(
                f"`path: {self.path}` is a folder. Name the data file in it; for pictures with "
                f"captions write  use: folder, for parquet or Arrow files  use: parquet  or  "
                f"use: arrow."
            )
        return path

    def title(self) -> str:
        """Return the name for logs and counts."""
        return self.name or Path(self.path).stem


def find_local(path: str, folder: Path) -> Path:
    """Find a path beside the recipe, or from the current directory.

    Raises:
        DataError: if it is an address.
    """
    if "://" in path:
        raise DataError(
            f"`path: {path}` is an address, and this source reads files of this machine. Copy it "
            f"here first, or write use: webdataset, use: hub or use: parquet, which read addresses."
        )
    beside = folder / Path(path).expanduser()
    return (beside if beside.exists() else Path(path).expanduser()).absolute()


def repeated(ids: Iterable[Any]) -> NDArray[np.bool_]:
    """Return for every row whether an earlier row has the same id; rows without one never.

    >>> repeated([7, "a", "7", None, None, "a"]).tolist()
    [False, False, True, False, False, True]
    """
    keys = np.fromiter((key_of(i) if isinstance(i, str | int) and i != "" else 0 for i in ids),
                       dtype=np.uint64)  # fmt: skip
    again = np.ones(len(keys), dtype=bool)
    again[np.unique(keys, return_index=True)[1]] = False
    return again & (keys != 0)


def refuse_repeated(repeats: NDArray[np.bool_] | None, row: int) -> None:
    """Raise if a row was found to repeat an id."""
    if repeats is not None and repeats[row]:
        raise BadRowError("duplicate_id", f"row {row}")


@sources.register("jsonl")
class JsonLinesConfig(FileConfig):
    """One JSON object a line."""

    def open(self, folder: Path) -> Source:
        """Find the lines."""
        return FileSource(
            self.title(), index_lines(self.locate(folder)), parse_line, self.reader(),
            unique_ids=self.unique_ids,
        )  # fmt: skip


@sources.register("json")
class JsonConfig(FileConfig):
    """One JSON array of objects, as LLaVA's files are."""

    def open(self, folder: Path) -> Source:
        """Find the elements of the array."""
        return FileSource(
            self.title(), index_json(self.locate(folder)), parse_line, self.reader(),
            unique_ids=self.unique_ids,
        )  # fmt: skip


@sources.register("csv")
class CsvConfig(FileConfig):
    """A table with a header line. Cells may hold line breaks if they are quoted."""

    delimiter: str | None = Field(default=None, min_length=1, max_length=1)
    """What stands between cells; by default a tab for .tsv files and a comma for others."""

    def open(self, folder: Path) -> Source:
        """Read the header and find the rows."""
        path = self.locate(folder)
        delimiter = self.delimiter or ("\t" if path.suffix.lower() == ".tsv" else ",")
        header, rows = index_csv(path)
        try:
            names = next(csv.reader(io.StringIO(header.decode("utf-8-sig")), delimiter=delimiter))
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"The header of {path} cannot be read: {error}") from None
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise DataError(f"{path} has the column {doubled[0]!r} twice. Rename one of them.")
        if self.columns.answer not in names:
            raise DataError(
                f"{path} has no column {self.columns.answer!r}; its columns are "
                f"{', '.join(names)}. Say which holds what, e.g. "
                f"columns: {{image: {names[0]}, answer: {names[-1]}}}."
            )

        def parse(raw: bytes) -> dict[str, str]:
            try:
                cells = next(csv.reader(io.StringIO(raw.decode("utf-8")), delimiter=delimiter))
            except UnicodeDecodeError as error:
                raise BadRowError("bad_unicode", str(error)) from None
            except (csv.Error, StopIteration) as error:
                raise BadRowError("not_a_row", str(error)) from None
            if len(cells) != len(names):
                raise BadRowError(
                    "not_a_row", f"{len(cells)} cells under {len(names)} column names"
                )
            return dict(zip(names, cells, strict=True))

        return FileSource(self.title(), rows, parse, self.reader(), unique_ids=self.unique_ids)


def parse_line(raw: bytes) -> Any:
    """Read one JSON value.

    Raises:
        BadRowError: if it is none.
    """
    try:
        return parse_json(raw)
    except (ValueError, RecursionError) as error:
        raise BadRowError("not_json", str(error)) from None


SUFFIXES: dict[str, str] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".tar": "webdataset",
}
"""Which source reads a file that is named by its path alone."""
