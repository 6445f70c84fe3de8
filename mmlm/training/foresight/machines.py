"""Machines by name: what their datasheets promise, for forecasts and for MFU.

Rates are dense (without structured sparsity), bf16 with float32 accumulation, in FLOP/s; memory
is that of one device. `link` is what one device sends to the others of its machine, in one
direction. Prices are round numbers for an hour of one device on demand, assumed and not quoted;
a user who knows a price says it with `--price`.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from itertools import pairwise

import torch

from mmlm.errors import UsageError

_WRITTEN = re.compile(r"(?:(?P<count>\d+)\s*[x×])?\s*(?P<name>[A-Za-z0-9-]+)")


@dataclass(frozen=True)
class Machine:
    """One device, by its datasheet.

    Args:
        name: As people write it.
        flops: Dense bf16 rate, in FLOP/s.
        memory: In bytes.
        bandwidth: Of its memory, in bytes a second.
        link: To the other devices of the machine, one direction, in bytes a second.
        price: Of an hour of one device, in US dollars; assumed.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    link: float
    price: float


_GIB = 2.0**30
_TABLE = (
    Machine("B200", 2250e12, 180e9, 8.0e12, 900e9, 5.5),
    Machine("H200", 989e12, 141e9, 4.8e12, 450e9, 3.8),
    Machine("H100", 989e12, 80 * _GIB, 3.35e12, 450e9, 3.0),
    Machine("H100-PCIe", 756e12, 80 * _GIB, 2.0e12, 64e9, 2.5),
    Machine("MI300X", 1307e12, 192e9, 5.3e12, 448e9, 3.0),
    Machine("A100", 312e12, 80 * _GIB, 2.04e12, 300e9, 1.8),
    Machine("A100-40", 312e12, 40 * _GIB, 1.56e12, 300e9, 1.3),
    Machine("L40S", 362e12, 48e9, 864e9, 32e9, 1.2),
    Machine("A10", 125e12, 24e9, 600e9, 32e9, 0.8),
    Machine("L4", 121e12, 24e9, 300e9, 32e9, 0.7),
    Machine("RTX4090", 165e12, 24 * _GIB, 1.01e12, 32e9, 0.5),
    Machine("RTX3090", 71e12, 24 * _GIB, 936e9, 32e9, 0.3),
)
MACHINES = {machine.name.lower(): machine for machine in _TABLE}


@dataclass(frozen=True)
class Hardware:
    """So many devices of one kind."""

    count: int
    machine: Machine

    @property
    def text(self) -> str:
        """As people write it.

        >>> read_hardware("8xh100").text
        '8x H100'
        """
        return f"{self.count}x {self.machine.name}"


def read_hardware(words: str, *, price: float | None = None) -> Hardware:
    """Read ``8xH100``, ``A100-40`` or ``8x H100``.

    Args:
        words: What the user wrote.
        price: For an hour of one device, instead of the table's.

    Raises:
        UsageError: if no machine has this name.

    >>> read_hardware("8xH100", price=2.0).machine.price
    2.0
    """
    match = _WRITTEN.fullmatch(words.strip())
    name = "" if match is None else match["name"].lower()
    if match is None or name not in MACHINES or int(match["count"] or 1) < 1:
        near = get_close_matches(name, MACHINES, n=1, cutoff=0.4)
        hint = f" Did you mean {MACHINES[near[0]].name!r}?" if near else ""
        known = ", ".join(machine.name for machine in _TABLE)
        raise UsageError(
            f"No machine is written {words!r}.{hint} Write a number and a name, such as 8xH100. "
            f"Known: {known}."
        )
    machine = MACHINES[name]
    if price is not None:
        machine = replace(machine, price=price)
    return Hardware(int(match["count"] or 1), machine)


def peak_rate(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Return the FLOP/s that MFU is measured against, and where the number comes from.

    On a GPU it is the datasheet's dense bf16 rate; on a GPU that is not in the table, and on a
    CPU, it is the rate of a large matrix product, measured once.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = machine_named(name)
        if known is not None:
            return known.flops, f"the datasheet's dense bf16 rate of {known.name}"
    return measured_rate(device.type, dtype), "a matrix product that was measured here"


def machine_named(device_name: str) -> Machine | None:
    """Return the machine that a driver's name means.

    >>> machine_named("NVIDIA H100 80GB HBM3").name, machine_named("NVIDIA A100-SXM4-40GB").name
    ('H100', 'A100-40')
    >>> machine_named("NVIDIA GeForce RTX 4090").name, machine_named("Tesla T4")
    ('RTX4090', None)
    """
    words = re.findall(r"[a-z0-9]+", device_name.lower())
    if "a100" in words and "40gb" in words:
        return MACHINES["a100-40"]
    if "h100" in words and "pcie" in words:
        return MACHINES["h100-pcie"]
    said = {*words, *(one + two for one, two in pairwise(words))}
    return next((machine for name, machine in MACHINES.items() if name in said), None)


@cache
def measured_rate(device: str, dtype: torch.dtype, size: int = 1024) -> float:
    """Return the best rate of some square matrix products, in FLOP/s; under 0.1 s on a CPU."""
    a = torch.randn(size, size, device=device).to(dtype)
    best = 0.0
    for _ in range(4):
        start = time.perf_counter()
        torch.mm(a, a)
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best
