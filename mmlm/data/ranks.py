"""Streams on several ranks: each reads shards of its own, and all take their steps together.

    rank 0: shards 0, 2, 4 ──► plan, pack ──► rows ┐
    rank 1: shards 1, 3, 5 ──► plan, pack ──► rows ┴► one step, counted over all ranks

Where every source is indexed, all ranks plan one sequence of rows and it is dealt out; nothing here
is needed then. A split stream would cost each rank the reading of all shards, so each plans its
own. What a step counts - samples, tokens, drops - is gathered, because schedules and ends hang on
it. Exact for one list of shards and one number of ranks; a checkpoint holds the state of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mmlm.data.mixture import Mixture
from mmlm.data.pipeline import Step
from mmlm.errors import TrainingError

Gather = Callable[[list[Any]], list[Any]]
"""Joins the lists of all ranks, in their order."""

MakeSteps = Callable[..., Iterable[Step]]
"""Makes a stream of steps of ``mixture, rows_per_step, num_samples, rank, world, state``."""


def steps_of_rank(
    make: MakeSteps,
    mixture: Mixture,
    *,
    rows_per_step: int,
    num_samples: int | None,
    rank: int,
    world: int,
    state: dict[str, Any] | None,
    gather: Gather,
) -> Iterable[Step]:
    """Return the steps of one rank, whichever way the data are dealt out.

    Args:
        make: Makes a stream of steps.
        mixture: The whole mixture.
        rows_per_step: The rows of all ranks together.
        num_samples: The samples of all ranks together; None goes on for ever.
        rank: Which rank this is.
        world: The number of ranks.
        state: From where to go on.
        gather: Joins the lists of all ranks.

    Raises:
        TrainingError: if a checkpoint of another number of ranks is to be gone on with.
        DataError: if a stream has fewer shards than there are ranks.
    """
    splits = world > 1 and mixture.splits
    states = None if state is None else state.get("ranks")
    if state is not None and (len(states or [None]) != (world if splits else 1)):
        raise TrainingError(
            f"This run was stopped on {len(states or [None])} ranks that read parts of a stream, "
            f"and is to go on with {world}. What each had read cannot be dealt out anew: use as "
            f"many ranks as before, or begin anew with --fresh."
        )
    if not splits:
        return make(
            mixture, rows_per_step=rows_per_step, num_samples=num_samples, rank=rank, world=world,
            state=state,
        )  # fmt: skip
    part = mixture.part(rank, world)
    own = None
    if num_samples is not None:
        own = max(1, round(num_samples * part.epoch_rows / mixture.epoch_rows))
    steps = make(
        part, rows_per_step=max(1, rows_per_step // world), num_samples=own, rank=0, world=1,
        state=None if states is None else states[rank],
    )  # fmt: skip
    return joined(steps, rank=rank, world=world, gather=gather, state=states)


def joined(
    steps: Iterable[Step],
    *,
    rank: int,
    world: int,
    gather: Gather,
    state: list[Any] | None = None,
) -> Iterator[Step]:
    """Yield the steps of one rank with the counts of all; a rank that has no more rows waits.

    Every rank goes through this in step with the others.
    """
    waiting = iter(steps)
    states: list[Any] = list(state) if state is not None else [None] * world
    consumed = [one["consumed"] if one else 0 for one in states]
    while True:
        step = next(waiting, None)
        decoded = 0 if step is None else sum(len(row.drops) for row in step.rows)
        told: list[Any] = [None]
        if step is not None:
            planned = step.drops[: len(step.drops) - decoded]
            numbers = (step.num_rows, step.num_samples, step.num_tokens, step.num_seen)
            told = [(*numbers, step.capacity_tokens, step.consumed, step.state, planned)]
        all_told = gather(told)
        if all(one is None for one in all_told):
            return
        for number, one in enumerate(all_told):
            if one is not None:
                consumed[number], states[number] = one[5], one[6]
        known = [one for one in all_told if one is not None]
        rows, samples, tokens, seen, capacity = (sum(one[n] for one in known) for n in range(5))
        planned_by_all = [drop for one in known for drop in one[7]]
        mine = [] if step is None else step.drops[len(step.drops) - decoded :]
        yield Step(
            rows=[] if step is None else step.rows,
            num_rows=rows,
            num_samples=samples,
            num_tokens=tokens,
            drops=[*planned_by_all, *mine],
            num_seen=seen,
            consumed=sum(consumed),
            state={"ranks": list(states)},
            capacity_tokens=capacity,
            places=[] if step is None else [rank + place * world for place in step.places],
        )
