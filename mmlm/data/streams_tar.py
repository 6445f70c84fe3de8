"""Streams of tar files as WebDataset writes them: members with one stem are one row.

    000017.jpg  000017.txt                       a picture and its caption
    000018.0.png  000018.1.png  000018.json      pictures, and a row of any shape

`json` gives the keys of the row, `txt` its answer, pictures its images in the order of their
names. Files of this machine and fsspec addresses; nothing is unpacked to disk and no pipe is
run. Headers are read here and not by `tarfile`, which ends in silence where an archive was
cut. Compressed archives are refused: they cannot be gone on with in the middle.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from pydantic import Field

from mmlm.data.base import Source, sources
from mmlm.data.schema import BadRowError
from mmlm.data.shards import filesystem, find_shards, is_address
from mmlm.data.sources_folder import SUFFIXES
from mmlm.data.sources_rows import Columns
from mmlm.data.streams import OpenShard, Shards, StreamConfig
from mmlm.errors import DataError

_BLOCK = 512
_MOST_MEMBER_BYTES = 256 << 20
_MOST_HEADER_BYTES = 1 << 20
_TEXTS = ("txt", "caption", "text")
_DIGITS = re.compile(r"(\d+)")


class Member(NamedTuple):
    """One file in an archive: where its headers begin, and where its bytes are."""

    name: str
    begins: int
    data: int
    size: int


class _CutError(Exception):
    """The archive ends, or is none, at an offset where it must go on."""

    def __init__(self, offset: int, what: str) -> None:
        super().__init__(f"{what} at byte {offset:,}")
        self.offset = offset


class TarShard(OpenShard):
    """The rows of one archive.

    Args:
        path: A path or an fsspec address.
        columns: Which key of a row holds what.
        start: Where the next row begins; None if the shard was read to its end.
    """

    def __init__(self, path: str, columns: Columns, start: int | None) -> None:
        self._path, self._columns, self._start = path, columns, start

    def state(self) -> int | None:
        """Return where the next row begins, or None at the end."""
        return self._start

    def __iter__(self) -> Iterator[Any]:
        """Go through the rows."""
        if self._start is None:
            return
        try:
            file = open_binary(self._path)
        except (OSError, DataError) as error:
            self._start = None
            yield BadRowError("no_shard", str(error))
            return
        with file:
            yield from self._rows(file, self._start)

    def _rows(self, file: Any, start: int) -> Iterator[Any]:
        stem, files = "", dict[str, bytes | BadRowError]()
        try:
            for member in members(file, start):
                found, suffix = _split(member.name)
                if not suffix:
                    continue
                if files and found != stem:
                    self._start = member.begins
                    yield _row(stem, files, self._columns)
                    files = {}
                stem = found
                files[suffix] = (
                    BadRowError("duplicate_id", f"{member.name} stands in the archive twice")
                    if suffix in files
                    else _content(file, member)
                )
        except (_CutError, OSError) as error:
            self._start = None
            at_once = isinstance(error, _CutError) and error.offset == 0
            yield BadRowError("no_shard" if at_once else "cut_shard", str(error))
            return
        self._start = None
        if files:
            yield _row(stem, files, self._columns)


def members(file: Any, start: int = 0) -> Iterator[Member]:
    """Go through the regular files of an archive; names of any length are understood.

    Raises:
        _CutError: where the archive ends without its end mark, or holds something else.
    """
    position = start
    while True:
        begins, name, size = position, None, None
        while True:
            header = _read(file, position, _BLOCK)
            if not header.strip(b"\0"):
                return
            try:
                info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            except tarfile.HeaderError as error:
                raise _CutError(position, f"no tar header ({error})") from None
            data = position + _BLOCK
            length = info.size if size is None or _is_extra(info) else size
            position = data + -(-length // _BLOCK) * _BLOCK
            if not _is_extra(info):
                break
            name, size = _extra(file, info, data, (name, size))
        if info.isreg():
            yield Member(info.name if name is None else name, begins, data, length)


def _is_extra(info: tarfile.TarInfo) -> bool:
    """Whether a header only says more about the next one."""
    return info.type in (
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
        tarfile.SOLARIS_XHDTYPE,
    )


def _extra(
    file: Any, info: tarfile.TarInfo, data: int, known: tuple[str | None, int | None]
) -> tuple[str | None, int | None]:
    """Return the name and the size that a header gives to the next one."""
    if info.size > _MOST_HEADER_BYTES:
        raise _CutError(data, f"a header of {info.size:,} bytes")
    name, size = known
    raw = _read(file, data, info.size)
    if info.type == tarfile.GNUTYPE_LONGNAME:
        return raw.rstrip(b"\0").decode("utf-8", "surrogateescape"), size
    if info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
        for key, value in _pax_records(raw, data):
            if key == b"path":
                name = value.decode("utf-8", "surrogateescape")
            elif key == b"size" and value.isdigit():
                size = int(value)
    return name, size


def _pax_records(raw: bytes, offset: int) -> Iterator[tuple[bytes, bytes]]:
    """Read records: their length, a space, key=value, a line break."""
    while raw:
        digits, space, _ = raw.partition(b" ")
        length = int(digits) if space and digits.isdigit() else 0
        record = raw[len(digits) + 1 : length]
        if not record.endswith(b"\n"):
            raise _CutError(offset, "a broken pax header")
        key, _, value = record[:-1].partition(b"=")
        yield key, value
        raw = raw[length:]


def _read(file: Any, offset: int, size: int) -> bytes:
    file.seek(offset)
    data = file.read(size)
    if len(data) != size:
        raise _CutError(offset, "the archive ends")
    return data


def _content(file: Any, member: Member) -> bytes | BadRowError:
    if member.size > _MOST_MEMBER_BYTES:
        return BadRowError("image_too_large", f"{member.name} has {member.size:,} bytes")
    return _read(file, member.data, member.size)


def _split(name: str) -> tuple[str, str]:
    """Split the name of a member at the first dot of its last part.

    >>> _split("train/0001.left.jpg"), _split("./.hidden"), _split("README")
    (('train/0001', 'left.jpg'), ('', ''), ('', ''))
    """
    folder, _, last = name.rpartition("/")
    stem, dot, suffix = last.partition(".")
    if not stem or not dot:
        return "", ""
    return (f"{folder}/{stem}" if folder else stem), suffix.lower()


def _row(stem: str, files: dict[str, bytes | BadRowError], columns: Columns) -> Any:
    """Make the values of a row out of its files, or say why there is none."""
    whole: dict[str, bytes] = {}
    for suffix, content in files.items():
        if isinstance(content, BadRowError):
            return content
        whole[suffix] = content
    values: Any = {}
    if "json" in whole:
        try:
            values = json.loads(whole["json"].decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            return BadRowError("not_json", f"{stem}.json: {error}")
        if not isinstance(values, dict):
            return BadRowError("not_a_row", f"{stem}.json is no object with keys")
    pictures = [suffix for suffix in whole if f".{suffix}".endswith(SUFFIXES)]
    if pictures:
        values.pop("images", None)
        values[columns.image] = [whole[suffix] for suffix in sorted(pictures, key=_natural)]
    text = next((whole[suffix] for suffix in _TEXTS if suffix in whole), None)
    if text is not None and columns.answer not in values:
        try:
            values[columns.answer] = text.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            return BadRowError("bad_unicode", f"{stem}: {error}")
    values.setdefault(columns.id, stem)
    return values


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort numbers inside names by their value: 2.jpg before 10.jpg."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in _DIGITS.split(name) if part
    ]


def open_binary(path: str) -> Any:
    """Open a path or an fsspec address for reading at any place."""
    if is_address(path):
        system, inner = filesystem(path)
        return system.open(inner, "rb")
    return open(path, "rb")


class TarShards(Shards):
    """A list of archives."""

    def __init__(self, names: list[str], columns: Columns) -> None:
        self.names, self._columns = names, columns

    def open(self, number: int) -> OpenShard:
        """Open an archive."""
        return TarShard(self.names[number], self._columns, 0)

    def go_on(self, number: int, state: Any) -> OpenShard:
        """Open an archive at the offset of its next row."""
        return TarShard(self.names[number], self._columns, state)

    def part(self, numbers: list[int]) -> Shards:
        """Return some of the archives."""
        return TarShards([self.names[number] for number in numbers], self._columns)

    def fingerprint(self) -> str:
        """Return a hash of the names, and of the sizes of archives on this machine."""
        parts = [
            f"{PurePosixPath(name).name} "
            f"{os.path.getsize(name) if not is_address(name) and os.path.isfile(name) else '-'}"
            for name in self.names
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def count(self) -> int | None:
        """Count the rows by the headers of archives on this machine; addresses are not fetched."""
        return None if any(map(is_address, self.names)) else sum(map(_count, self.names))


def _count(name: str) -> int:
    rows, stem = 0, ""
    try:
        with open(name, "rb") as file:
            for member in members(file):
                found, suffix = _split(member.name)
                if suffix and found != stem:
                    rows, stem = rows + 1, found
    except (_CutError, OSError):
        rows += 1
    return rows


@sources.register("webdataset")
class WebDatasetConfig(StreamConfig):
    """A stream of tar files: members with one stem are one row."""

    path: str | list[str] = Field(min_length=1)
    """Archives: a file, a folder, a pattern such as shards/{000..127}.tar, an fsspec address, or
    a list of these."""

    def open(self, folder: Path) -> Source:
        """List the archives."""
        names = find_shards(self.path, folder, [".tar"])
        packed = [name for name in names if not name.lower().endswith(".tar")]
        if packed:
            raise DataError(
                f"{packed[0]} is no plain .tar file. Unpack a compressed archive first: a stream "
                f"must be able to go on in its middle."
            )
        name = self.name or PurePosixPath(names[0]).parent.name or "webdataset"
        return self.stream(name, TarShards(names, self.columns), folder)
