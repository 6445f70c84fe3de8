"""Rows fall into training, validation and test so that nothing which belongs together is parted.

Rows that share a key - a patient, a picture that looks alike - are one cluster, over any number
of steps. Whole clusters are dealt out, the largest first, each to the split that misses most. The
result hangs on the rows and the seed alone.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence

from mmlm.data.order import key_of
from mmlm.errors import DataError

SHARES: dict[str, float] = {"train": 0.8, "validation": 0.1, "test": 0.1}
"""The splits, and how much of the rows each is to have."""


def clusters(keys: Sequence[Iterable[Hashable]]) -> list[list[int]]:
    """Put rows together that share a key, directly or through others.

    Args:
        keys: The keys of each row.

    Returns:
        Row numbers of each cluster, in order.

    >>> clusters([["ann"], ["bob", 1], [1], [], ["ann"]])
    [[0, 4], [1, 2], [3]]
    """
    above = list(range(len(keys)))

    def top(row: int) -> int:
        while above[row] != row:
            above[row] = above[above[row]]
            row = above[row]
        return row

    first: dict[Hashable, int] = {}
    for row, names in enumerate(keys):
        for name in names:
            one, other = top(row), top(first.setdefault(name, row))
            above[max(one, other)] = min(one, other)
    found: dict[int, list[int]] = {}
    for row in range(len(keys)):
        found.setdefault(top(row), []).append(row)
    return list(found.values())


def deal(
    groups: Sequence[Sequence[int]], *, seed: int = 0, shares: Mapping[str, float] = SHARES
) -> dict[str, list[int]]:
    """Deal clusters to the splits.

    Args:
        groups: Row numbers of each cluster.
        seed: Changes which cluster goes where.
        shares: How much each split is to have.

    Returns:
        Row numbers of each split, in order. No split is empty.

    Raises:
        DataError: if there are fewer clusters than splits.
    """
    if len(groups) < len(shares):
        raise DataError(
            f"The rows fall into {len(groups)} groups that may not be parted, and "
            f"{', '.join(shares)} need one each. Add rows; or, if rows belong together that need "
            f"not, choose another --group, or --alike 0 to keep only equal pictures together."
        )
    total = sum(len(group) for group in groups)
    missing = {name: share * total for name, share in shares.items()}
    dealt: dict[str, list[Sequence[int]]] = {name: [] for name in shares}
    for group in sorted(groups, key=lambda group: (-len(group), key_of(seed, group[0]))):
        name = max(missing, key=lambda name: missing[name])
        dealt[name].append(group)
        missing[name] -= len(group)
    for name in shares:
        if not dealt[name]:
            richest = max(dealt, key=lambda other: len(dealt[other]))
            dealt[name].append(dealt[richest].pop())
    return {name: sorted(row for group in held for row in group) for name, held in dealt.items()}
