"""sha256 of files and folders.

A folder's hash covers the names and contents of its files, in an order that does not depend on
the file system. Hashes of package files, kept while the file stands, are in `parts`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

_HIDDEN = "."


def sha256_of_file(path: str | Path) -> str:
    """Return the sha256 of a file, in hexadecimal, without reading it at once."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_folder(path: str | Path) -> str:
    """Return one sha256 over names and contents of all files below `path`, hidden ones aside."""
    path = Path(path)
    digest = hashlib.sha256()
    names = sorted(
        file.relative_to(path).as_posix()
        for file in path.rglob("*")
        if file.is_file()
        and not any(part.startswith(_HIDDEN) for part in file.relative_to(path).parts)
    )
    for name in names:
        digest.update(f"{sha256_of_file(path / name)}  {name}\n".encode())
    return digest.hexdigest()
