"""The order of samples: a pure function of a seed and a position.

No list is shuffled and nothing is remembered: `permute` computes where any position goes,
so a run that is resumed at position seven million knows what comes next, and the order is
the same for any number of workers and ranks. Changing anything in this module changes the
order of every run; a test holds the values.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6


def key_of(*parts: object) -> int:
    """Return a 64-bit key for any parts that print the same everywhere."""
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def permute(indices: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    """Map indices in ``[0, size)`` one to one onto ``[0, size)``, as `key` says.

    A Feistel network over the next even power of two, walked until it lands inside: every
    index is computed by itself, in constant memory.

    >>> permute(np.arange(5), 5, key=1).tolist()
    [0, 4, 3, 1, 2]
    >>> sorted(permute(np.arange(1000), 1000, key=7).tolist()) == list(range(1000))
    True
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    values = np.asarray(indices, dtype=np.uint64).copy()
    outside = np.ones(values.shape, dtype=bool)
    while outside.any():
        values[outside] = _feistel(values[outside], half, key)
        outside = values >= size
    return values.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half: int, key: int) -> NDArray[np.uint64]:
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> shift, values & mask
    for turn in range(_ROUNDS):
        salt = np.uint64((key + turn * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF)
        left, right = right, left ^ (_mix(right ^ salt) & mask)
    return (left << shift) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64 bits (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
