"""Memory that is free goes back to the system between the rows of a step.

The C library of Linux keeps blocks that were freed, up to 32 MiB each, for the next that ask. A
forward pass fills such holes with blocks of other sizes and leaves the rest, so that a process
comes to hold half as much again as its tensors take. Between two rows the holes are largest and
least is kept: what is given back there is touched again only where it is needed.

Only where tensors lie in the memory of the machine; other C libraries than glibc are left alone.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache

import torch


def give_back(device: torch.device) -> None:
    """Give free memory back to the system, where the tensors of `device` lie in it."""
    if device.type == "cpu" and (trim := _trim()) is not None:
        trim(0)


@cache
def _trim() -> Callable[[int], int] | None:
    """Return `malloc_trim` of glibc, or None where there is no such function."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
