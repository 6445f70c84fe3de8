"""The table of builders, and the one place where a built data set is made or found.

A data set is a pure function of the builder's own settings and version; both are hashed into
the name of its folder, so that a changed builder never meets an old folder.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

from mmlm.errors import ConfigError
from mmlm.storage import cache_folder

REPORT = "build.json"
"""The file that stands in a finished folder, written last."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Builder:
    """How one data set is made.

    Args:
        about: What it is, in a sentence.
        key: Changes whenever the result would change.
        make: Fills an empty folder and returns what the report says.
    """

    about: str
    key: Callable[[], str]
    make: Callable[[Path, Say], dict[str, Any]]


@dataclass(frozen=True)
class Built:
    """A data set on this machine.

    Args:
        folder: Where its rows and pictures are.
        report: What is in it, where it is from, and under which licences.
        fresh: Whether it was made just now.
    """

    folder: Path
    report: dict[str, Any]
    fresh: bool

    def rows(self, name: str) -> Path:
        """Return the file of one set of rows, such as ``align``.

        Raises:
            ConfigError: if there is no such set.
        """
        path = self.folder / f"{name}.jsonl"
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in self.folder.glob("*.jsonl")))
            raise ConfigError(f"{self.folder} has no rows {name!r}. Known: {known}.")
        return path


def _of(name: str) -> Callable[[], Builder]:
    """Return what imports one module of this package when it is asked for."""

    def read() -> Builder:
        module: Any = import_module(f"mmlm.data.builders.{name}")
        return Builder(module.ABOUT, module.key, module.make)

    return read


_MODULES = ("quickstart", "scenes", "charts", "documents", "fractals")
BUILDERS: dict[str, Callable[[], Builder]] = {name: _of(name) for name in _MODULES}
"""What `mmlm data build NAME` knows."""


def built_folder(name: str) -> Path:
    """Return where a data set is or would be in the cache."""
    return cache_folder("built") / f"{name}-{_builder(name).key()}"


def build(
    name: str, *, out: Path | None = None, fresh: bool = False, say: Say = lambda _: None
) -> Built:
    """Make a data set, or find the finished one.

    Args:
        name: Which one.
        out: The folder to make; by default one in the cache.
        fresh: Make it again even if it is there.
        say: Gets a line for each thing that is done.

    Raises:
        ConfigError: if no builder has the name, or `out` holds something else.
        DataError: if what it needs cannot be fetched or read.
    """
    builder = _builder(name)
    folder = built_folder(name) if out is None else Path(out)
    report = folder / REPORT
    if report.is_file() and not fresh:
        found = json.loads(report.read_text(encoding="utf-8"))
        if found.get("key") == builder.key():
            return Built(folder, found, fresh=False)
    if folder.exists() and any(folder.iterdir()) and not report.is_file():
        raise ConfigError(f"{folder} holds other things. Name an empty folder or a new one.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        said = {"name": name, "key": builder.key(), **builder.make(unfinished, say)}
        text = json.dumps(said, indent=2, ensure_ascii=False)
        (unfinished / REPORT).write_text(text + "\n", encoding="utf-8")
        unfinished.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return Built(folder, said, fresh=True)


def _builder(name: str) -> Builder:
    if name not in BUILDERS:
        near = get_close_matches(name, BUILDERS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"No data set that MMLM builds is named {name!r}.{hint} Known: {', '.join(BUILDERS)}."
        )
    return BUILDERS[name]()
