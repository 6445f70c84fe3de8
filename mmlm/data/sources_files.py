"""Sources that are files on this machine: JSON lines, one JSON array, and CSV.

Each opens in one pass that only finds where the rows begin (`sources_index`); a row is
read, parsed and shaped (`sources_rows`) when it is asked for. Paths are relative to the
recipe that names them, image paths to the data file.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field

from mmlm.data.base import Source, SourceConfig, sources
from mmlm.data.schema import BadRowError, Sample
from mmlm.data.sources_index import RowFile, index_csv, index_json, index_lines, parse_json
from mmlm.data.sources_rows import Columns, RowReader
from mmlm.errors import DataError

csv.field_size_limit(1 << 27)


class FileSource(Source):
    """The rows of one file."""

    def __init__(
        self, name: str, rows: RowFile, parse: Callable[[bytes], Any], reader: RowReader
    ) -> None:
        self.name = name
        self._rows, self._parse, self._reader = rows, parse, reader
        self._folder = rows.path.parent

    def __len__(self) -> int:
        return len(self._rows)

    def sample(self, row: int) -> Sample:
        """Read, parse and shape one row."""
        values = self._parse(self._rows.read(row))
        return self._reader.read(values, number=row, source=self.name, folder=self._folder)

    def fingerprint(self) -> str:
        """Return what the file is, by content."""
        return self._rows.fingerprint()


class FileConfig(SourceConfig):
    """What the sources that are one file have in common."""

    path: str = Field(min_length=1)
    """The data file, relative to the recipe that names it."""

    columns: Columns = Columns()
    """Names of the columns, where they are not image, question and answer."""

    question: str | None = None
    """Asked of every row that has no question of its own."""

    system: str | None = None
    """A system turn before every conversation that has none."""

    images: str | None = None
    """Folder in which image paths begin; by default the folder of the data file."""

    max_images: int = Field(default=64, ge=1)
    """Most images in one row; a row with more is dropped and counted."""

    def reader(self) -> RowReader:
        """Return what turns a row of this file into a sample."""
        return RowReader(
            columns=self.columns,
            question=self.question,
            system=self.system,
            images=self.images,
            max_images=self.max_images,
        )

    def locate(self, folder: Path) -> Path:
        """Find the data file beside the recipe, or from the current directory."""
        beside = folder / Path(self.path).expanduser()
        path = beside if beside.exists() else Path(self.path).expanduser()
        if path.is_dir():
            raise DataError(f"`path: {self.path}` is a folder. Name the data file in it.")
        return path.absolute()

    def title(self) -> str:
        """Return the name for logs and counts."""
        return self.name or Path(self.path).stem


@sources.register("jsonl")
class JsonLinesConfig(FileConfig):
    """One JSON object a line."""

    def open(self, folder: Path) -> Source:
        """Find the lines."""
        return FileSource(
            self.title(), index_lines(self.locate(folder)), _parse_json, self.reader()
        )


@sources.register("json")
class JsonConfig(FileConfig):
    """One JSON array of objects, as LLaVA's files are."""

    def open(self, folder: Path) -> Source:
        """Find the elements of the array."""
        return FileSource(self.title(), index_json(self.locate(folder)), _parse_json, self.reader())


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
            except (UnicodeDecodeError, csv.Error, StopIteration) as error:
                raise BadRowError("not_a_row", str(error)) from None
            if len(cells) != len(names):
                raise BadRowError(
                    "not_a_row", f"{len(cells)} cells under {len(names)} column names"
                )
            return dict(zip(names, cells, strict=True))

        return FileSource(self.title(), rows, parse, self.reader())


def _parse_json(raw: bytes) -> Any:
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
}
"""Which source reads a file that is named by its path alone."""
