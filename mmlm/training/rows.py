"""Rows cut in half, and rows that hold nothing to learn.

Because the loss is divided by what the whole step learns, a row may be computed in pieces, and
a piece of which nothing is learnt may be added, without any change but the order of a sum.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mmlm.data.pipeline import PreparedRow
from mmlm.data.planning import Planned


def halves(row: PreparedRow, times: int) -> list[PreparedRow]:
    """Cut a row between its samples into up to 2**times pieces of about the same length.

    >>> def sample(n):
    ...     return Planned(0, "", 0, "", np.zeros(n), np.zeros(n), (), 0)
    >>> row = PreparedRow([sample(n) for n in (5, 3, 2, 6)], [])
    >>> [[s.num_tokens for s in piece.samples] for piece in halves(row, 1)]
    [[5, 3], [2, 6]]
    >>> [len(halves(row, times)) for times in (0, 2, 3)]
    [1, 4, 4]
    """
    if times == 0 or len(row.samples) < 2:
        return [row]
    middle, so_far, cut = row.num_tokens / 2, 0, 1
    for index, sample in enumerate(row.samples[:-1]):
        so_far += sample.num_tokens
        cut = index + 1
        if so_far >= middle:
            break
    images = sum(len(sample.images) for sample in row.samples[:cut])
    first = PreparedRow(row.samples[:cut], row.images[:images])
    second = PreparedRow(row.samples[cut:], row.images[images:])
    return halves(first, times - 1) + halves(second, times - 1)


def filler() -> tuple[PreparedRow, list[Tensor]]:
    """Return a row of two words whose one label weighs nothing, and its factors."""
    ids, labels = np.zeros(2, dtype=np.int64), np.array([-100, 0], dtype=np.int64)
    return PreparedRow([Planned(0, "", 0, "", ids, labels, (), 0)], []), [torch.zeros(2)]
