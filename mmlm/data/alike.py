"""Pictures that look alike: copies at another size, re-encoded, slightly cropped or brightened.

Each picture becomes a difference hash: it is shrunk to a few cells, and a bit says of each pair
of neighbours whether the second is clearly brighter. It is the dHash of N. Krawetz (2013), along
rows and columns, 256 bits each, with a margin so that noise in flat areas sets no bit. Two are
alike if few of the bits that are set in either differ, and if their mean colours are near.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_CELLS = 16
_MARGIN = 2
_MOST_COLOUR = 24
_BLOCK_WORDS = 1 << 22
MOST_DIFFERENT = 0.15
"""Copies were seen up to 0.11, other pictures down to 0.5 (`tests/data/test_alike.py`)."""


class Look(NamedTuple):
    """What is compared of a picture.

    Args:
        bits: 64 bytes of difference hash.
        colour: Mean red, green and blue.
    """

    bits: bytes
    colour: tuple[int, int, int]


def look_of(picture: Image.Image) -> Look:
    """Hash a picture in RGB."""
    grey = picture.convert("L")
    box = Image.Resampling.BOX
    wide = np.asarray(grey.resize((_CELLS + 1, _CELLS), box), dtype=np.int16)
    tall = np.asarray(grey.resize((_CELLS, _CELLS + 1), box), dtype=np.int16)
    along = wide[:, 1:] > wide[:, :-1] + _MARGIN
    down = tall[1:] > tall[:-1] + _MARGIN
    red, green, blue = np.asarray(picture.resize((1, 1), box))[0, 0].tolist()
    return Look(np.packbits([along, down]).tobytes(), (red, green, blue))


def difference(one: Look, other: Look) -> float:
    """Return the share of bits, among those set in either, that differ; 1 for other colours."""
    if max(abs(a - b) for a, b in zip(one.colour, other.colour, strict=True)) > _MOST_COLOUR:
        return 1.0
    first, second = int.from_bytes(one.bits), int.from_bytes(other.bits)
    either = (first | second).bit_count()
    return (first ^ second).bit_count() / either if either else 0.0


def alike(looks: Sequence[Look], *, most: float = MOST_DIFFERENT) -> list[tuple[int, int]]:
    """Return all pairs whose `difference` is at most `most`.

    Every picture is compared with every other that has about as many bits: ten thousand pictures
    are fifty million comparisons of eight words.
    """
    if not looks:
        return []
    words = np.frombuffer(b"".join(look.bits for look in looks), dtype=np.uint64)
    words = words.reshape(len(looks), -1)
    colours = np.array([look.colour for look in looks], dtype=np.int16)
    counts = np.bitwise_count(words).sum(1).astype(np.int64)
    order = np.argsort(counts, kind="stable")
    words, colours, counts = words[order], colours[order], counts[order]
    # A pair can only be near if  larger - smaller <= most * (larger + smaller).
    reach = counts * (1 + most) / max(1 - most, 1e-9)
    ends = np.searchsorted(counts, reach, side="right")
    pairs: list[tuple[int, int]] = []
    start = 0
    while start < len(words):
        size = max(1, _BLOCK_WORDS // (words.shape[1] * max(int(ends[start]) - start, 1)))
        stop = min(start + size, len(words))
        last = int(ends[stop - 1])
        for row, column in _near(words, colours, start, stop, last, most):
            pairs.append((int(order[row]), int(order[column])))
        start = stop
    return sorted((min(pair), max(pair)) for pair in pairs)


def _near(
    words: NDArray[np.uint64], colours: NDArray[np.int16], start: int, stop: int, last: int,
    most: float,
) -> list[tuple[int, int]]:  # fmt: skip
    """Compare the rows of one block with all that stand behind them, up to `last`."""
    block, others = words[start:stop, None], words[None, start:last]
    differing = np.bitwise_count(block ^ others).sum(2, dtype=np.int32)
    either = np.bitwise_count(block | others).sum(2, dtype=np.int32)
    near = differing <= most * either
    near &= (np.abs(colours[start:stop, None] - colours[None, start:last]) <= _MOST_COLOUR).all(2)
    rows, columns = np.nonzero(near)
    behind = columns > rows
    return list(zip((rows[behind] + start).tolist(), (columns[behind] + start).tolist(),
                    strict=True))  # fmt: skip
