"""Indexed sources that are tables: parquet files, and Arrow files as `datasets` writes them.

Arrow files are mapped into memory and cost nothing to open. Of parquet only the footers are
read, and a row group when one of its rows is asked for; files whose row groups are too large for
that are written once as Arrow files into the cache. Pictures are bytes or paths in the rows.
For parquet that should be read in order and not at random there is `streams_hub`.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from mmlm.data.base import Source, sources
from mmlm.data.schema import Sample
from mmlm.data.shards import filesystem, find_shards, is_address
from mmlm.data.sources_files import refuse_repeated, repeated
from mmlm.data.sources_rows import RowReader, RowsConfig
from mmlm.errors import DataError, MissingExtraError
from mmlm.storage import cache_folder

_MOST_GROUP_BYTES = 32 << 20
_GROUPS_KEPT = 4
_FILES_OPEN = 32
_ROWS_A_BATCH = 64
_PROBE_BYTES = 1 << 16


class Rows(ABC):
    """The rows of one or more tables, by number."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def row(self, number: int) -> dict[str, Any]:
        """Return one row as plain values."""

    @abstractmethod
    def column(self, name: str) -> Iterator[Any]:
        """Go through one column; nothing at all if there is none of this name."""


class ArrowRows(Rows):
    """Record batches that lie in mapped files.

    Raises:
        DataError: if a file is no Arrow file, or was cut short.
    """

    def __init__(self, files: Sequence[str]) -> None:
        self._batches = [batch for file in files for batch in _batches(file)]
        self._ends = np.cumsum([batch.num_rows for batch in self._batches], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def row(self, number: int) -> dict[str, Any]:
        """Return one row as plain values."""
        place = int(np.searchsorted(self._ends, number, side="right"))
        batch = self._batches[place]
        return batch.slice(number - int(self._ends[place]) + batch.num_rows, 1).to_pylist()[0]

    def column(self, name: str) -> Iterator[Any]:
        """Go through one column."""
        for batch in self._batches:
            if name in batch.schema.names:
                yield from batch.column(name).to_pylist()


def _batches(file: str) -> list[Any]:
    pa = arrow()
    try:
        mapped = pa.memory_map(file)
        try:
            reader = pa.ipc.open_file(mapped)
            return [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except pa.ArrowInvalid:
            mapped.seek(0)
            return list(pa.ipc.open_stream(mapped))
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{file} is no whole Arrow file ({error}): it was cut short, or is something else. "
            f"Write it again."
        ) from None


class ParquetRows(Rows):
    """Row groups of parquet files, read as they are asked for.

    Args:
        files: Paths or fsspec addresses.

    Raises:
        DataError: if a file is no parquet file, or was cut short.
    """

    def __init__(self, files: Sequence[str]) -> None:
        self._files = list(files)
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._groups: OrderedDict[int, Any] = OrderedDict()
        self._places: list[tuple[int, int]] = []
        counts: list[int] = []
        self.most_group_bytes = 0
        for index in range(len(files)):
            footer = self._file(index).metadata
            for group in range(footer.num_row_groups):
                facts = footer.row_group(group)
                self._places.append((index, group))
                counts.append(facts.num_rows)
                self.most_group_bytes = max(self.most_group_bytes, facts.total_byte_size)
        self._counts = counts
        self._ends = np.cumsum(counts, dtype=np.int64)

    def _file(self, index: int) -> Any:
        if index not in self._open:
            self._open[index] = open_parquet(self._files[index])
            while len(self._open) > _FILES_OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(index)
        return self._open[index]

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def row(self, number: int) -> dict[str, Any]:
        """Return one row as plain values."""
        place = int(np.searchsorted(self._ends, number, side="right"))
        if place not in self._groups:
            index, group = self._places[place]
            self._groups[place] = self._file(index).read_row_group(group, use_threads=False)
            while len(self._groups) > _GROUPS_KEPT:
                self._groups.popitem(last=False)
        self._groups.move_to_end(place)
        within = number - int(self._ends[place]) + self._counts[place]
        return self._groups[place].slice(within, 1).to_pylist()[0]

    def column(self, name: str) -> Iterator[Any]:
        """Go through one column."""
        for index in range(len(self._files)):
            file = self._file(index)
            if name in file.schema_arrow.names:
                for batch in file.iter_batches(columns=[name], use_threads=False):
                    yield from batch.column(0).to_pylist()


def open_parquet(file: str) -> Any:
    """Open a parquet file up to its footer.

    Raises:
        DataError: if it is no parquet file, or was cut short.
    """
    import pyarrow.parquet as pq

    pa = arrow()
    try:
        if is_address(file):
            system, path = filesystem(file)
            return pq.ParquetFile(system.open(path, "rb"))
        return pq.ParquetFile(file, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{file} is no whole parquet file ({error}): it was cut short, or is something else. "
            f"Fetch or write it again."
        ) from None


def as_arrow(file: str) -> str:
    """Write a parquet file into the cache as an Arrow file, once; return the file."""
    pa = arrow()
    place = cache_folder("parquet") / f"{_print_of(file)}.arrow"
    if place.exists():
        return str(place)
    unfinished = place.with_suffix(f".{os.getpid()}")
    parquet = open_parquet(file)
    with pa.OSFile(str(unfinished), "wb") as out, pa.ipc.new_file(out, parquet.schema_arrow) as to:
        for batch in parquet.iter_batches(batch_size=_ROWS_A_BATCH, use_threads=False):
            to.write_batch(batch)
    unfinished.replace(place)
    return str(place)


class TableSource(Source):
    """Rows of tables as samples."""

    def __init__(
        self, name: str, rows: Rows, files: Sequence[str], reader: RowReader, *, unique_ids: bool
    ) -> None:
        self.name = name
        self._rows, self._files, self._reader = rows, list(files), reader
        self._folder = Path(self._files[0]).parent if self._files else Path()
        self._repeats = repeated(rows.column(reader.columns.id)) if unique_ids else None
        if self._repeats is not None and len(self._repeats) != len(rows):
            raise DataError(
                f"{name} has no column {reader.columns.id!r} in some of its files, and "
                f"`unique_ids` needs it. Name it: columns: {{id: …}}."
            )
        # Mapped files must not change below a run, so one look at them is enough.
        prints = "\n".join(f"{Path(file).name} {_print_of(file)}" for file in self._files)
        self._print = f"{len(rows)}-{hashlib.sha256(prints.encode()).hexdigest()[:16]}"

    def __len__(self) -> int:
        return len(self._rows)

    def sample(self, row: int) -> Sample:
        """Read and shape one row."""
        refuse_repeated(self._repeats, row)
        values = self._rows.row(row)
        return self._reader.read(values, number=row, source=self.name, folder=self._folder)

    def fingerprint(self) -> str:
        """Return what the files are: names, sizes, and a hash of their beginnings and ends."""
        return self._print


class TableConfig(RowsConfig):
    """What the sources that are tables have in common."""

    path: str | list[str] = Field(min_length=1)
    """A file, a folder, a pattern, or several, relative to the recipe that names them."""

    unique_ids: bool = False
    """Drop and count rows whose id an earlier row has. It costs one pass over the column."""

    def title(self) -> str:
        """Return the name for logs and counts."""
        first = self.path if isinstance(self.path, str) else self.path[0]
        return self.name or Path(first).stem.strip("*") or Path(first).parent.name


@sources.register("arrow")
class ArrowConfig(TableConfig):
    """Arrow files, or the folder of `Dataset.save_to_disk`, at random without loading them."""

    def open(self, folder: Path) -> Source:
        """Map the files."""
        arrow()
        files = _saved_files(self.path, folder) or find_shards(self.path, folder, [".arrow"])
        rows = ArrowRows(files)
        return TableSource(self.title(), rows, files, self.reader(), unique_ids=self.unique_ids)


@sources.register("parquet")
class ParquetConfig(TableConfig):
    """Parquet files, at random without loading them; fsspec addresses too."""

    def open(self, folder: Path) -> Source:
        """Read the footers, and write Arrow files where row groups are too large."""
        arrow()
        files = find_shards(self.path, folder, [".parquet"])
        rows: Rows = ParquetRows(files)
        if isinstance(rows, ParquetRows) and rows.most_group_bytes > _MOST_GROUP_BYTES:
            if any(map(is_address, files)):
                raise DataError(
                    f"{self.title()} has row groups of {rows.most_group_bytes >> 20} MiB, too "
                    f"large to fetch for single rows. Stream it: use: hub, repo: parquet, "
                    f"files: …; or copy it to this machine."
                )
            rows = ArrowRows([as_arrow(file) for file in files])
        return TableSource(self.title(), rows, files, self.reader(), unique_ids=self.unique_ids)


def _saved_files(path: str | list[str], folder: Path) -> list[str]:
    """Return the files of a `save_to_disk` folder in their order, or nothing."""
    if not isinstance(path, str):
        return []
    for home in (folder / Path(path).expanduser(), Path(path).expanduser()):
        if (home / "dataset_dict.json").is_file():
            splits = json.loads((home / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            raise DataError(
                f"`path: {path}` holds several splits: {', '.join(splits)}. Name one of them: "
                f"path: {path.rstrip('/')}/{splits[0]}."
            )
        if (home / "state.json").is_file():
            state = json.loads((home / "state.json").read_text(encoding="utf-8"))
            return [str((home / part["filename"]).absolute()) for part in state["_data_files"]]
    return []


def _print_of(file: str) -> str:
    """Return a short text for what a file is."""
    if is_address(file):
        system, path = filesystem(file)
        return f"{system.size(path)}"
    digest, size = hashlib.sha256(), os.stat(file).st_size
    with open(file, "rb") as opened:
        digest.update(opened.read(_PROBE_BYTES))
        opened.seek(max(0, size - _PROBE_BYTES))
        digest.update(opened.read(_PROBE_BYTES))
    return f"{size}-{digest.hexdigest()[:24]}"


def arrow() -> Any:
    """Return pyarrow.

    Raises:
        MissingExtraError: if it is not installed.
    """
    try:
        import pyarrow
    except ImportError:
        raise MissingExtraError(
            "pyarrow", needed_for="A parquet or Arrow source", extra="train"
        ) from None
    return pyarrow
