"""Writes that are whole or did not happen: beside, flush to disk, rename.

    with atomic_folder(path) as unfinished: …     a folder
    write_atomic(path, text)                      a file
    AppendLog(path).append({…})                   a log that survives a torn last line

A crash, a full disk or Ctrl-C leaves what was there before. What is written is not known here.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_ASIDE = ".unfinished-"
_OLD = ".replaced-"


@contextmanager
def atomic_folder(path: str | Path) -> Generator[Path]:
    """Give an empty folder beside `path`; when the block ends well it takes the place of `path`.

    Files are flushed to disk before the rename. If the block raises, what was written is removed
    and an earlier folder stays as it was. Folders that dead processes left behind are cleared.

    Yields:
        The folder to write into.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(path)
    unfinished = path.with_name(f"{_ASIDE}{path.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    unfinished.mkdir()
    try:
        yield unfinished
        for file in sorted(unfinished.rglob("*")):
            _sync(file)
        _sync(unfinished)
        _swap(unfinished, path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    _sync(path.parent)


def _swap(unfinished: Path, path: Path) -> None:
    """Put a finished folder in the place of an earlier one.

    Two renames: between them the place is empty, and `recover` puts the earlier folder back if
    the process dies exactly there.
    """
    recover(path)
    old: Path | None = None
    if path.exists():
        old = path.with_name(f"{_OLD}{path.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
        path.rename(old)
    try:
        unfinished.rename(path)
    except OSError:
        if old is not None:
            old.rename(path)
        raise
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def recover(path: str | Path) -> None:
    """Put back a folder whose replacement was cut off between its two renames."""
    path = Path(path)
    if path.exists() or not path.parent.is_dir():
        return
    olds = sorted(path.parent.glob(f"{_OLD}{path.name}-*"), key=lambda old: old.stat().st_mtime_ns)
    if olds:
        olds[-1].rename(path)


def _clear_leftovers(path: Path) -> None:
    """Remove what processes that are gone left beside `path`."""
    recover(path)
    for prefix in (_ASIDE, _OLD):
        for leftover in path.parent.glob(f"{prefix}{path.name}-*"):
            owner = leftover.name.removeprefix(f"{prefix}{path.name}-").split("-")[0]
            if owner.isdigit() and not _alive(int(owner)):
                shutil.rmtree(leftover, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write one file so that readers see the old content or the new, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{_ASIDE}{path.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        with unfinished.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Flush a file or a folder to disk, where the file system can."""
    if path.is_symlink():
        return
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
    with suppress(PermissionError, IsADirectoryError):  # folders cannot be opened on Windows
        descriptor = os.open(path, flags)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class AppendLog:
    """A file of JSON lines that only grows; a line that a crash tore is dropped, and counted.

    Args:
        path: The file; made when the first line is written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def append(self, *rows: dict[str, Any]) -> None:
        """Write rows and flush them to disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with self.path.open("ab+") as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a torn line: end it, so that it spoils no other
                    text = "\n" + text
            file.write(text.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> tuple[list[dict[str, Any]], int]:
        """Return the rows, and how many torn lines were left out."""
        if not self.path.exists():
            return [], 0
        rows: list[dict[str, Any]] = []
        torn = 0
        for line in self.path.read_bytes().split(b"\n"):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except ValueError:
                torn += 1
        return rows, torn
