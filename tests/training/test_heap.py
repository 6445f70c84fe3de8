"""What torch frees in small pieces goes back to the system."""

import platform
from pathlib import Path

import pytest
import torch

from mmlm.training.heap import give_back

_MIB = 1 << 20


def resident() -> int:
    """Bytes of this process in memory."""
    (line,) = (
        line for line in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in line
    )
    return 1024 * int(line.split()[1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone keeps blocks so")
def test_holes_between_tensors_go_back_to_the_system():
    # Once a large block was freed, glibc puts all that are smaller into one heap.
    torch.ones(31 * _MIB, dtype=torch.uint8).sum()
    kept = [torch.ones(_MIB, dtype=torch.uint8) for _ in range(120)]
    del kept[::2]
    before = resident()
    give_back(torch.device("meta"))
    assert resident() > before - 5 * _MIB
    give_back(torch.device("cpu"))
    assert resident() < before - 50 * _MIB
    assert all(bool((one == 1).all()) for one in kept)
