"""Features of a frozen encoder, computed once for each picture and kept on disk.

The folder's name stands for weights, preprocessing and precision; an entry's key for the
bytes of the picture. Features are appended to a file and read from a memory map of it; an entry is
written down only after its features, with a checksum, so that a crash leaves nothing wrong.
Several processes write files of their own and read everybody's. The space on disk is bounded for
all of them together: who adds looks at what all have written, one at a time.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmlm.features import Grid, VisionFeatures
from mmlm.images import split_reference
from mmlm.training.trunk import Trunk

_READ_ONLY = os.O_RDONLY
_ALIGNED = 8


class _Entry(NamedTuple):
    file: int
    offset: int
    size: int
    checksum: int
    grids: tuple[Grid, ...]


class FeatureCache:
    """Features by the key of their picture.

    Args:
        folder: Where the files are; one folder for each encoder, policy and precision.
        width: Width of a feature.
        dtype: Precision of the features.
        most_bytes: What all processes together may write into the folder; what would be more is
            not kept.
    """

    def __init__(self, folder: Path, *, width: int, dtype: torch.dtype, most_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.width, self.dtype, self.most_bytes = folder, width, dtype, most_bytes
        self._entries: dict[str, _Entry] = {}
        self._files: list[int] = []
        self._maps: dict[int, mmap.mmap] = {}
        for index in sorted(folder.glob("part-*.index")):
            self._read_part(index)
        self._index, self._data, self._own = self._open_own()
        self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        self._is_full = False
        self.hits, self.misses = 0, 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def add(self, pictures: Sequence[tuple[str, VisionFeatures]]) -> None:
        """Write the features of pictures down, while there is space."""
        if self._is_full or not pictures:
            return
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            self._add(pictures, room=self.most_bytes - self.num_bytes())
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    def num_bytes(self) -> int:
        """Return what all processes have written into the folder."""
        parts = [*self.folder.glob("part-*.data"), *self.folder.glob("part-*.index")]
        return sum(part.stat().st_size for part in parts)

    def _add(self, pictures: Sequence[tuple[str, VisionFeatures]], room: int) -> None:
        lines: list[str] = []
        blobs: list[bytes] = []
        offset = os.lseek(self._data, 0, os.SEEK_END)
        gap = -offset % _ALIGNED  # after a write that was cut
        if gap:
            blobs.append(bytes(gap))
            offset, room = offset + gap, room - gap
        for key, features in pictures:
            values = features.values.to(self.dtype).contiguous()
            blob = values.view(torch.uint8).numpy().tobytes()
            entry = _Entry(self._own, offset, len(blob), zlib.crc32(blob), features.grids)
            line = json.dumps([key, *entry[1:4], [list(grid) for grid in entry.grids]])
            room -= len(blob) + len(line) + 1
            if room < 0:
                self._is_full = True
                break
            lines.append(line)
            blobs.append(blob)
            self._entries[key] = entry
            offset += len(blob)
        if not lines:
            return
        _append(self._data, b"".join(blobs))
        _append(self._index, ("\n".join(lines) + "\n").encode())

    def get(self, key: str) -> VisionFeatures | None:
        """Return the features of a picture, or None if they are unknown or damaged."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        mapped = self._mapped(entry)
        if mapped is None or zlib.crc32(mapped) != entry.checksum:
            del self._entries[key]
            return None
        values = torch.frombuffer(mapped, dtype=self.dtype).view(-1, self.width)
        return VisionFeatures(values, entry.grids)

    def _mapped(self, entry: _Entry) -> memoryview | None:
        """Return an entry's bytes in the mapped file, or None where the file ends before them."""
        end = entry.offset + entry.size
        known = self._maps.get(entry.file)
        if known is None or len(known) < end:
            file = self._files[entry.file]
            size = os.fstat(file).st_size
            if size < end:
                return None
            # A private map: a tensor may be written to, and the file never is.
            known = self._maps[entry.file] = mmap.mmap(file, size, access=mmap.ACCESS_COPY)
        return memoryview(known)[entry.offset : end]

    def _read_part(self, index: Path) -> None:
        data = index.with_suffix(".data")
        if not data.exists():
            return
        file = os.open(data, _READ_ONLY)
        size = os.fstat(file).st_size
        number = len(self._files)
        self._files.append(file)
        for line in index.read_text(encoding="utf-8").splitlines():
            try:
                key, offset, length, checksum, grids = json.loads(line)
            except ValueError:
                continue  # the last line of a process that was killed while writing
            if offset + length <= size:
                shape = tuple(Grid(*grid) for grid in grids)
                self._entries[key] = _Entry(number, offset, length, checksum, shape)

    def _open_own(self) -> tuple[int, int, int]:
        """Take the first part that no other process is writing."""
        number = 0
        while True:
            index = os.open(self.folder / f"part-{number:04d}.index", os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(index, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(index)
                number += 1
                continue
            end = os.lseek(index, 0, os.SEEK_END)
            if end and os.pread(index, 1, end - 1) != b"\n":
                _append(index, b"\n")
            path = self.folder / f"part-{number:04d}.data"
            data = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            self._files.append(os.open(path, _READ_ONLY))
            return index, data, len(self._files) - 1

    def close(self) -> None:
        """Give the files back."""
        for file in (*self._files, self._index, self._data, self._lock):
            os.close(file)
        self._files, self._entries, self._maps = [], {}, {}


def _append(file: int, data: bytes) -> None:
    """Write all of `data` at the end of a file."""
    view = memoryview(data)
    os.lseek(file, 0, os.SEEK_END)
    while view:
        view = view[os.write(file, view) :]


class TrunkCache(FeatureCache):
    """What the lower layers of a tuned encoder give, instead of features.

    Args:
        trunk: Those layers.
        folder: See `FeatureCache`.
        most_bytes: See `FeatureCache`.
    """

    def __init__(self, trunk: Trunk, folder: Path, *, most_bytes: int) -> None:
        width = trunk.shape.numel()
        super().__init__(folder, width=width, dtype=trunk.dtype, most_bytes=most_bytes)
        self.trunk = trunk


def weights_key(weights: Mapping[str, Tensor], facts: Any) -> str:
    """Return a name for what an encoder computes: from its weights and everything in `facts`."""
    digest = hashlib.blake2b(
        json.dumps(facts, sort_keys=True, default=str).encode(), digest_size=12
    )
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(str(tensor.dtype).encode())
        raw: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(raw)
    return digest.hexdigest()


class ImageKeys:
    """Keys of pictures by the bytes of their files; a file that has not changed is read once."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, int, str]] = {}

    def of(self, image: Any) -> str:
        """Return the key of a path, of bytes, or of a picture in memory."""
        if isinstance(image, str | os.PathLike):
            file, number = split_reference(image)
            path, part = os.fspath(file), f"#{number}" if number else ""
            facts = os.stat(path)
            known = self._known.get(path)
            if known is not None and known[:2] == (facts.st_mtime_ns, facts.st_size):
                return known[2] + part
            with open(path, "rb") as file:
                key = hashlib.file_digest(file, _digest).hexdigest()
            self._known[path] = (facts.st_mtime_ns, facts.st_size, key)
            return key + part
        raw = image if isinstance(image, bytes) else image.mode.encode() + image.tobytes()
        if not isinstance(image, bytes):
            raw += str(image.size).encode()
        return _digest(raw).hexdigest()


def _digest(data: bytes = b"") -> Any:
    return hashlib.blake2b(data, digest_size=16)
