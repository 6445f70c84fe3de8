"""`mmlm doctor`: what this machine and this installation can do, and what is missing.

It reads; it changes nothing and downloads nothing. The checks of a recipe are `mmlm check`,
those of a running training `mmlm.training`.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from mmlm.cli.base import Command, Options, Parser

_REQUIREMENT = re.compile(r"^\s*(?P<name>[\w.-]+)\s*(?P<range>[^;\[]*)(?:;\s*(?P<marker>.*))?$")


def _arguments(parser: Parser) -> None:
    del parser  # `mmlm doctor` has no words


def _run(options: Options) -> int:
    del options
    missing: list[str] = []
    from mmlm.training.doctor import describe_machine

    for word, sentence in [*_machine(), *describe_machine(), ("offline", _hub())]:
        print(f"{word:12}{sentence}")
    for extra, packages in _requirements().items():
        lacking = [name for name, installed in packages.items() if installed is None]
        there = [f"{name} {found}" for name, found in packages.items() if found is not None]
        if extra == "":
            print(f"{'needed':12}{', '.join(there)}")
            missing = lacking
        elif lacking:
            print(f"{extra:12}missing: {', '.join(lacking)}   pip install 'mmlm[{extra}]'")
        else:
            print(f"{extra:12}{', '.join(there)}")
    if missing:
        print(f"\nNot well: {', '.join(missing)} must be installed. pip install mmlm")
        return 1
    print("\nWell: everything that MMLM needs is here.")
    return 0


def _machine() -> list[tuple[str, str]]:
    free = shutil.disk_usage(Path.cwd()).free
    return [
        ("python", f"{platform.python_version()} at {sys.executable}"),
        ("machine", f"{platform.system()} {platform.machine()}, {_num_cpus()} CPU cores"),
        ("disk", f"{free / 2**30:.1f} GiB free here"),
    ]


def _num_cpus() -> int:
    """The cores that this process may use, which in a container are fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _hub() -> str:
    from huggingface_hub import constants

    state = "yes, HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "no"
    return f"{state}; files of the Hub are kept in {constants.HF_HUB_CACHE}"


def _requirements() -> dict[str, dict[str, str | None]]:
    """Return extra → package → installed version; the extra "" is what every user needs."""
    found: dict[str, dict[str, str | None]] = {"": {}}
    for name, extra in _declared():
        if extra != "dev":
            found.setdefault(extra, {})[name] = _installed(name)
    return found


def _declared() -> Iterator[tuple[str, str]]:
    for line in requires("mmlm") or ():
        match = _REQUIREMENT.match(line)
        if match is not None:
            extra = re.search(r"extra == ['\"]([\w-]+)['\"]", match["marker"] or "")
            yield match["name"], extra[1] if extra else ""


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


COMMANDS = {
    "doctor": Command(
        name="doctor",
        usage="",
        about="Say what this machine and this installation can do, and what is missing.",
        arguments=_arguments,
        run=_run,
        examples=[("mmlm doctor", "nothing is changed, nothing downloaded")],
    )
}
