"""The rows of a step are dealt to the ranks, so that none waits long for another.

In a step everybody waits for the slowest rank. Rows are of one length and not of one cost: long
samples attend more, and pictures pass an encoder. So the dearest row goes first, to whoever has
least so far (the longest processing time first, Graham 1969), as many rows to each rank as if they
were dealt in turn. Which rows a step has is settled before, the same for any number of ranks; and
what a rank gets hangs on the costs alone, so that a run that goes on deals the same.
"""

from __future__ import annotations

from collections.abc import Sequence


def deal(costs: Sequence[float], world: int) -> list[list[int]]:
    """Return the numbers of the rows of each rank, in order.

    Args:
        costs: What each row costs, in any unit.
        world: The number of ranks.

    >>> deal([9, 1, 9, 1], 2)
    [[0, 1], [2, 3]]
    >>> deal([1, 9], 2)
    [[0], [1]]
    """
    in_turn = [list(range(rank, len(costs), world)) for rank in range(world)]
    if world == 1 or len(costs) <= world:
        return in_turn
    dealt: list[list[int]] = [[] for _ in range(world)]
    sums = [0.0] * world
    for row in sorted(range(len(costs)), key=lambda one: (-costs[one], one)):
        open_ranks = (r for r in range(world) if len(dealt[r]) < len(in_turn[r]))
        rank = min(open_ranks, key=lambda one: (sums[one], one))
        dealt[rank].append(row)
        sums[rank] += costs[row]
    if max(sums) >= max(sum(costs[row] for row in rows) for rows in in_turn):
        return in_turn
    return [sorted(rows) for rows in dealt]
