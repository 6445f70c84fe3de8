"""Where each row of a file begins and ends, so that any row can be read alone.

A million rows cost sixteen megabytes and one pass over the file; no row is kept. The rows
themselves are read by position with `pread`, which needs no lock between threads.
Three layouts: one JSON value a line, one JSON array, and CSV with quoted line breaks.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import mmap
import os
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmlm.errors import DataError

_CHUNK_BYTES = 1 << 24
_NEWLINE = 10
_QUOTE = 34
_JSON_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]|[^\s\[\]{},:"]+', re.DOTALL)


class RowFile:
    """The rows of one file, by number.

    Args:
        path: The file.
        starts: The first byte of each row.
        ends: One past the last byte of each row.
    """

    def __init__(self, path: Path, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> None:
        self.path = path
        self.starts, self.ends = starts, ends
        self._file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))

    def __len__(self) -> int:
        return len(self.starts)

    def read(self, row: int) -> bytes:
        """Return the bytes of one row."""
        start = int(self.starts[row])
        return os.pread(self._file, int(self.ends[row]) - start, start)

    def fingerprint(self) -> str:
        """Return the size of the file, its number of rows, and a hash of three places in it."""
        size = os.fstat(self._file).st_size
        digest = hashlib.sha256()
        for start in (0, max(0, size // 2 - 32768), max(0, size - 65536)):
            digest.update(os.pread(self._file, 65536, start))
        return f"{size}-{len(self)}-{digest.hexdigest()[:16]}"

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)


def index_lines(path: Path) -> RowFile:
    """Find the lines of a file; empty ones are no rows."""
    _require(path)
    ends = _line_ends(path, quoted=False)
    return _rows_between(path, ends, skip=0)


def index_csv(path: Path) -> tuple[bytes, RowFile]:
    """Find the rows of a CSV file, and its header. A quoted cell may hold line breaks."""
    _require(path)
    rows = _rows_between(path, _line_ends(path, quoted=True), skip=0)
    if not len(rows):
        raise DataError(f"{path} has no header line. A CSV begins with the names of its columns.")
    header = rows.read(0)
    return header, RowFile(path, rows.starts[1:], rows.ends[1:])


def index_json(path: Path) -> RowFile:
    """Find the elements of one JSON array without building it.

    Raises:
        DataError: if the file holds something other than one array.
    """
    _require(path)
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty. It must hold one JSON array of rows.")
    starts: list[int] = []
    ends: list[int] = []
    depth, element = 0, -1
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        head = re.match(rb"(?:\xef\xbb\xbf)?\s*\[", data)
        if head is None:
            raise DataError(
                f"{path} must hold one JSON array, beginning with '['. For one object a line, "
                f"write  use: jsonl."
            )
        for match in _JSON_TOKEN.finditer(data, head.end() - 1):
            token = match.group()
            if depth == 1 and token != b"]":
                element = match.start()
            if token in (b"[", b"{"):
                depth += 1
            elif token in (b"]", b"}"):
                depth -= 1
                if depth == 0:
                    break
            if depth == 1 and element >= 0:
                starts.append(element)
                ends.append(match.end())
                element = -1
    if depth != 0:
        raise DataError(
            f"{path} ends inside its array, after {len(starts):,} whole rows: the file was cut "
            f"short. Fetch or write it again."
        )
    return RowFile(path, np.array(starts, dtype=np.int64), np.array(ends, dtype=np.int64))


def _require(path: Path) -> None:
    if not path.is_file():
        raise DataError(f"There is no data file {path}. Check `path` in the data recipe.")


def _line_ends(path: Path, *, quoted: bool) -> NDArray[np.int64]:
    """Return the offset of each line break; with `quoted`, of those outside of quotes."""
    found: list[NDArray[np.int64]] = []
    offset, quotes = 0, 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            data = np.frombuffer(chunk, dtype=np.uint8)
            breaks = np.flatnonzero(data == _NEWLINE)
            if quoted:
                marks = np.flatnonzero(data == _QUOTE)
                before = quotes + np.searchsorted(marks, breaks)
                breaks = breaks[before % 2 == 0]
                quotes += len(marks)
            found.append(breaks.astype(np.int64) + offset)
            offset += len(chunk)
    found.append(np.array([offset], dtype=np.int64))
    return np.concatenate(found)


def _rows_between(path: Path, ends: NDArray[np.int64], *, skip: int) -> RowFile:
    starts = np.concatenate([np.zeros(1, dtype=np.int64), ends[:-1] + 1])
    # A line of one byte or none is an empty line ("\n" or "\r\n").
    real = ends - starts > 1
    lengths_of_one = np.flatnonzero(ends - starts == 1)
    if len(lengths_of_one):
        with path.open("rb") as file:
            for index in lengths_of_one:
                file.seek(int(starts[index]))
                real[index] = not file.read(1).isspace()
    return RowFile(path, starts[real][skip:], ends[real][skip:])


def parse_json(raw: bytes) -> object:
    """Parse one row, tolerating a byte-order mark.

    Raises:
        ValueError: if it is not JSON in UTF-8.
    """
    return json.loads(raw.removeprefix(codecs.BOM_UTF8).decode())
