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
    for heading, rows in (("machine", _machine()), ("offline", _hub()), ("device", _devices())):
        print(f"{heading:12}" + f"\n{'':12}".join(rows))
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


def _machine() -> list[str]:
    disk = shutil.disk_usage(Path.cwd())
    return [
        f"Python {platform.python_version()} at {sys.executable}",
        f"{platform.system()} {platform.machine()}, {_num_cpus()} CPU cores, "
        f"{_memory_gib():.1f} GiB memory, {disk.free / 2**30:.1f} GiB free on this disk",
    ]


def _num_cpus() -> int:
    """The cores that this process may use, which in a container are fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_gib() -> float:
    """The memory that this process may use: that of the container, if there is one."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return total / 2**30


def _hub() -> list[str]:
    from huggingface_hub import constants

    state = "yes: HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "no"
    return [f"{state}; Hub files are kept in {constants.HF_HUB_CACHE}"]


def _devices() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return ["no CUDA device; MMLM trains on the CPU"]
    rows: list[str] = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        rows.append(f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, {bf16}")
    return rows


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
