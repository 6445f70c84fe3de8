"""The list of files that a source names: one path, a folder, a pattern, or several of these.

    shards/                       all files of the source's kinds in a folder, by name
    shards/{00000..00127}.tar     a range, as WebDataset writes it; {train,extra} also works
    shards/*.tar                  a pattern
    s3://bucket/shards/*.tar      an fsspec address: the package for its protocol must be there

The order of the list is part of a run: it is sorted inside a folder or pattern and kept
otherwise. Nothing is read here but the names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmlm.errors import DataError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def is_address(path: str) -> bool:
    """Whether a path is an fsspec address, such as ``s3://bucket/a.tar``."""
    return "://" in path


def find_shards(paths: str | Sequence[str], folder: Path, suffixes: Sequence[str]) -> list[str]:
    """Return the files that `paths` name.

    Args:
        paths: What the recipe says.
        folder: Where relative paths begin; the current directory is tried next.
        suffixes: Which files of a folder are taken.

    Raises:
        DataError: if a name leads to nothing.
    """
    found: list[str] = []
    for path in [paths] if isinstance(paths, str) else paths:
        for name in expand_braces(path):
            files = _of_address(name) if is_address(name) else _of_path(name, folder, suffixes)
            if not files:
                raise DataError(
                    f"`path: {path}` names no file: {name} is not there, or holds no "
                    f"{' or '.join(suffixes)} file."
                )
            found += files
    return found


def expand_braces(pattern: str) -> Iterator[str]:
    """Write out the ranges and choices of a pattern.

    >>> list(expand_braces("a-{08..10}.{tar,idx}"))
    ['a-08.tar', 'a-08.idx', 'a-09.tar', 'a-09.idx', 'a-10.tar', 'a-10.idx']
    """
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    before, after = pattern[: match.start()], pattern[match.end() :]
    for choice in _choices(match.group(1)):
        for rest in expand_braces(after):
            yield before + choice + rest


def _choices(inside: str) -> list[str]:
    span = _RANGE.fullmatch(inside)
    if span is None:
        return inside.split(",")
    first, last = span.groups()
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]


def _of_path(name: str, folder: Path, suffixes: Sequence[str]) -> list[str]:
    for home in (folder, Path.cwd()):
        path = (home / Path(name).expanduser()).absolute()
        if path.is_dir():
            return sorted(str(p) for p in path.iterdir() if p.suffix.lower() in suffixes)
        if path.is_file():
            return [str(path)]
        if "*" in name or "?" in name:
            base = Path(path.anchor)
            if found := sorted(str(p) for p in base.glob(str(path.relative_to(base)))):
                return found
    # A single shard that is missing is counted by the stream, not fatal; see `streams`.
    return [str(folder / name)] if Path(name).suffix.lower() in suffixes else []


def _of_address(name: str) -> list[str]:
    if not any(mark in name for mark in "*?"):
        return [name]
    system, path = filesystem(name)
    return sorted(system.unstrip_protocol(found) for found in system.glob(path))


def filesystem(address: str) -> tuple[Any, str]:
    """Return the fsspec file system of an address, and the path inside it.

    Raises:
        DataError: if its protocol is unknown, or the package for it is not installed.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise DataError(f"{address} cannot be opened: {error}") from None
