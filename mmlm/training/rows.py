"""Rows cut in half, and rows that stand in where a rank has none.

Because the loss is divided by what the whole step learns, a row may be computed in pieces, and
one whose loss is multiplied by nothing may be added, without any change but the order of a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mmlm.data.pipeline import PreparedRow
from mmlm.data.planning import NOT_LEARNT, Planned
from mmlm.data.schema import Drop
from mmlm.errors import DataError, ImageError

_ROWS_TRIED, _SAMPLES_COMPARED = 500, 8


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


def two_words() -> PreparedRow:
    """Return a row of two words, the second of which could be learnt."""
    ids, labels = np.zeros(2, dtype=np.int64), np.array([NOT_LEARNT, 0], dtype=np.int64)
    return PreparedRow([Planned(0, "", 0, "", ids, labels, (), 0)], [])


def stand_in(
    plan: Callable[[int], Planned | Drop],
    num_rows: int,
    *,
    suits: Callable[[Planned], bool],
    opened: Callable[[Any], tuple[str, Any]],
) -> PreparedRow:
    """Return the shortest of a few samples that suit, as a row; the same on every rank.

    Args:
        plan: Turns the number of a row of the data into a sample.
        num_rows: Of the data.
        suits: Whether a sample will do.
        opened: Opens a picture.

    Raises:
        DataError: if no sample near the beginning of the data will do.
    """
    found: list[PreparedRow] = []
    for position in range(min(num_rows, _ROWS_TRIED)):
        planned = plan(position)
        if isinstance(planned, Drop) or not suits(planned):
            continue
        try:
            found.append(PreparedRow([planned], [opened(image) for image in planned.images]))
        except (ImageError, OSError):
            continue
        if len(found) == _SAMPLES_COMPARED:
            break
    if not found:
        raise DataError(
            f"Where a model is spread over processes, a sample with a picture stands in for a "
            f"rank that has none; there is none to learn from among the first {_ROWS_TRIED} rows. "
            f"Use run.sharding ddp, or put rows with pictures first."
        )
    return min(found, key=lambda row: row.num_tokens)


def with_picture(row: PreparedRow, other: PreparedRow) -> PreparedRow:
    """Add the sample of another row to one without a picture; nothing of it is learnt."""
    if row.images:
        return row
    unlearnt: Sequence[Planned] = [
        replace(one, labels=np.full_like(one.labels, NOT_LEARNT)) for one in other.samples
    ]
    return PreparedRow([*row.samples, *unlearnt], list(other.images))
