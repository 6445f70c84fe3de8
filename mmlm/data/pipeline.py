"""The stream of optimiser steps: plan, pack, decode, in order, ahead of the trainer.

One global sequence of rows is the same for any number of ranks; a step is a fixed number of
rows, dealt to the ranks by what they cost. One thread plans, a few decode; order and content
depend on neither. After each step the stream can say from where it would go on.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmlm.data.dealing import deal
from mmlm.data.packing import Packer, PackingConfig, Row
from mmlm.data.planning import Planned, Planner
from mmlm.data.schema import Drop
from mmlm.errors import ImageError, TrainingError

Cost = Callable[[Row], float]
"""What a row costs, in any unit; hangs on the row alone, so that a run that goes on deals alike."""

Pixels = Callable[[Any], "tuple[str, Tensor | None]"]
"""From an image to its key and its tiles, or None where the features are known already."""


@dataclass
class PreparedRow:
    """One row with its pixels.

    Args:
        samples: What shares the row, without those whose pictures could not be decoded.
        images: For every image in reading order its key and its tiles, or None if they are
            not needed.
        drops: Samples whose pictures turned out to be broken.
    """

    samples: list[Planned]
    images: list[tuple[str, Tensor | None]]
    drops: list[Drop] = field(default_factory=list)

    @property
    def num_labels(self) -> int:
        """The number of tokens that are learnt."""
        return sum(sample.num_labels for sample in self.samples)

    @property
    def num_tokens(self) -> int:
        """The number of tokens, image tokens included."""
        return sum(sample.num_tokens for sample in self.samples)


@dataclass
class Step:
    """What one optimiser step takes.

    Args:
        rows: The rows of this rank.
        num_rows: The number of rows of all ranks.
        num_samples: The samples of all ranks, before decoding.
        num_tokens: The tokens of all ranks, before decoding.
        drops: Samples left out while planning, and on this rank while decoding.
        num_seen: How many positions were looked at for this step.
        consumed: How many samples all steps up to this one have used or dropped.
        state: From where the stream goes on after this step.
        capacity_tokens: How many tokens the rows could have held.
        places: The number of each of the rows in the whole step.
    """

    rows: list[PreparedRow]
    num_rows: int
    num_samples: int
    num_tokens: int
    drops: list[Drop]
    num_seen: int
    consumed: int
    state: dict[str, Any]
    capacity_tokens: int
    places: list[int] = field(default_factory=list)

    def drops_of_all(self, gather: Callable[[list[Any]], list[Any]]) -> list[Drop]:
        """Return what was left out while planning, and on any rank while decoding.

        The order is that of one process. Every rank calls this.

        Args:
            gather: Joins the lists of all ranks.
        """
        mine = [
            (number, place, drop)
            for number, row in zip(self.places, self.rows, strict=True)
            for place, drop in enumerate(row.drops)
        ]
        known = len(self.drops) - len(mine)
        found = sorted(gather(mine), key=lambda one: one[:2])
        return self.drops[:known] + [drop for _, _, drop in found]


_MOST_DROPS_UNTOLD = 1000


class _StoppedError(Exception):
    """The consumer has gone away."""


class StepStream:
    """Steps of one stage, from a state on.

    Args:
        planner: Plans samples by position.
        packing: How samples share rows.
        rows_per_step: The rows of all ranks together.
        num_samples: Positions to go through; None goes on for ever.
        pixels: Opens one image.
        rank: Whose rows are decoded here.
        world: The number of ranks.
        cost: What a row costs, by which rows are dealt to the ranks; its tokens, if None.
        threads: How many images are decoded at once.
        ahead: How many steps are prepared before they are asked for.
        state: A state of an earlier stream; None begins at the beginning.
    """

    def __init__(
        self,
        planner: Planner,
        packing: PackingConfig,
        *,
        rows_per_step: int,
        num_samples: int | None,
        pixels: Pixels,
        rank: int = 0,
        world: int = 1,
        cost: Cost | None = None,
        threads: int = 1,
        ahead: int = 2,
        state: dict[str, Any] | None = None,
    ) -> None:
        self._planner, self._packing = planner, packing
        self._rows_per_step, self._num_samples = rows_per_step, num_samples
        self._pixels, self._rank, self._world = pixels, rank, world
        self._cost: Cost = cost or (lambda row: float(row.num_tokens))
        self._threads, self._ahead = threads, ahead
        self._start = state
        self._stop = threading.Event()

    def __iter__(self) -> Iterator[Step]:
        """Yield the steps; the threads end with the iteration."""
        ready: queue.Queue[Any] = queue.Queue(maxsize=self._ahead)
        self._stop.clear()
        pool = ThreadPoolExecutor(self._threads, "mmlm-decode", initializer=_one_thread)
        planning = threading.Thread(target=self._work, args=(ready, pool), daemon=True)
        planning.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                step, futures = item
                step.rows = [future.result() for future in futures]
                step.drops += [drop for row in step.rows for drop in row.drops]
                yield step
        finally:
            self._stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            while planning.is_alive():
                _drain(ready)
                planning.join(timeout=0.05)
            # What the workers set for themselves must not hold for threads that come later.
            torch.set_num_threads(torch.get_num_threads())

    def _work(self, ready: queue.Queue[Any], pool: ThreadPoolExecutor) -> None:
        _one_thread()
        try:
            for step, rows in self._plan():
                step.places = self._mine(rows)
                futures: list[Future[PreparedRow]] = [
                    pool.submit(self._prepare, rows[place]) for place in step.places
                ]
                self._put(ready, (step, futures))
            self._put(ready, None)
        except _StoppedError:
            return
        except BaseException as error:
            try:
                self._put(ready, error)
            except _StoppedError:
                return

    def _mine(self, rows: list[Row]) -> list[int]:
        """Return the numbers of the rows of this rank."""
        costs = [self._cost(row) for row in rows] if self._world > 1 else [0.0] * len(rows)
        return deal(costs, self._world)[self._rank]

    def _put(self, ready: queue.Queue[Any], item: Any) -> None:
        while True:
            if self._stop.is_set():
                raise _StoppedError
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def _plan(self) -> Iterator[tuple[Step, list[Row]]]:
        """Plan and pack; yield a step as soon as its rows are closed."""
        plan = _Plan(self._planner, self._packing, self._start)
        while self._num_samples is None or plan.position < self._num_samples:
            while len(plan.closed) >= self._rows_per_step:
                yield plan.take(self._rows_per_step)
            if self._stop.is_set():
                raise _StoppedError
            plan.advance()
            if len(plan.drops) >= _MOST_DROPS_UNTOLD:
                # An endless stage of which every sample is broken must meet its budget.
                yield plan.take(0)
        plan.flush()
        while plan.closed:
            yield plan.take(self._rows_per_step)
        if plan.drops:
            yield plan.take(0)

    def _prepare(self, row: Row) -> PreparedRow:
        """Open the pictures of a row; a sample with a broken one is left out and counted."""
        prepared = PreparedRow([], [])
        for sample in row.samples:
            try:
                images = [self._pixels(image) for image in sample.images]
            except (ImageError, OSError) as error:
                prepared.drops.append(
                    Drop(sample.source, sample.row, sample.id, "bad_image", str(error))
                )
                continue
            prepared.samples.append(sample)
            prepared.images += images
        return prepared


class _Plan:
    """The planning of a stream: where it is, what waits, what was dropped since the last step."""

    def __init__(
        self, planner: Planner, packing: PackingConfig, state: dict[str, Any] | None
    ) -> None:
        self._planner, self._packing = planner, packing
        self._packer = Packer(packing)
        self.position, self._consumed, self._seen = 0, 0, 0
        self.closed: list[Row] = []
        self.drops: list[Drop] = []
        if state is not None:
            self._restore(state)

    def _restore(self, state: dict[str, Any]) -> None:
        self.position, self._consumed = state["position"], state["consumed"]
        self._planner.mixture.restore_streams(state.get("streams", {}))
        samples: dict[int, Planned] = {}
        # In order, because a stream is read forward.
        for position in sorted([*state["pool"], *(p for row in state["closed"] for p in row)]):
            planned = self._planner.plan(position)
            if isinstance(planned, Drop):
                raise TrainingError(
                    f"Sample {planned.id} of {planned.source} was good when the run was stopped "
                    f"and is not any more: {planned.detail}. Bring the data back, or begin anew "
                    f"with --fresh."
                )
            samples[position] = planned
        self._packer.restore([samples[position] for position in state["pool"]])
        self.closed = [Row([samples[p] for p in positions]) for positions in state["closed"]]

    def advance(self) -> None:
        """Plan one more sample."""
        planned = self._planner.plan(self.position)
        self.position += 1
        self._seen += 1
        if isinstance(planned, Drop):
            self.drops.append(planned)
        else:
            self.closed += self._packer.add(planned)

    def flush(self) -> None:
        """Close all rows."""
        self.closed += self._packer.flush()

    def take(self, num_rows: int) -> tuple[Step, list[Row]]:
        """Make a step of the first closed rows, and of all that was dropped on the way."""
        rows, self.closed = self.closed[:num_rows], self.closed[num_rows:]
        num_samples = sum(len(row.samples) for row in rows)
        self._consumed += num_samples + len(self.drops)
        state = {
            "position": self.position,
            "consumed": self._consumed,
            "pool": self._packer.state(),
            "closed": [[sample.position for sample in row.samples] for row in self.closed],
            "streams": self._planner.mixture.stream_states(self._oldest()),
        }
        step = Step(
            rows=[],
            num_rows=len(rows),
            num_samples=num_samples,
            num_tokens=sum(row.num_tokens for row in rows),
            drops=self.drops,
            num_seen=self._seen,
            consumed=self._consumed,
            state=state,
            capacity_tokens=len(rows) * self._packing.row_tokens,
        )
        self.drops, self._seen = [], 0
        return step, rows

    def _oldest(self) -> dict[str, int]:
        """For each source the first of its rows that is not used yet."""
        waiting = [
            *self._packer.waiting,
            *(sample for row in self.closed for sample in row.samples),
        ]
        oldest: dict[str, int] = {}
        for sample in waiting:
            oldest[sample.source] = min(sample.row, oldest.get(sample.source, sample.row))
        return oldest


def _one_thread() -> None:
    """Keep decoding from taking the cores that the model computes on."""
    torch.set_num_threads(1)


def _drain(ready: queue.Queue[Any]) -> None:
    try:
        while True:
            ready.get_nowait()
    except queue.Empty:
        return
