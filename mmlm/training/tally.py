"""What a stage adds up about its steps: how much of the machine it used, what each source cost.

MFU is the useful FLOPs of the step (see `foresight.flops`) over what the devices could have done in
the same time: by the datasheet on a GPU, by a measured matrix product on a CPU. The loss by source
is the mean over learnt tokens, before any weighting. Everything here only watches: leaving it out
changes no step.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmlm.data.pipeline import PreparedRow, Step
from mmlm.training.foresight.flops import Costs, costs_of
from mmlm.training.foresight.machines import peak_rate
from mmlm.training.objectives import NextToken, Objective
from mmlm.training.parallel import Engine
from mmlm.whole import WholeModel

_KEPT = 0.9


class SourceLosses:
    """The summed loss and the learnt tokens of each source, over the rows of one step."""

    def __init__(self) -> None:
        self._found: list[tuple[Sequence[Any], Tensor]] = []

    def forget(self) -> None:
        """Begin a step, or repeat it."""
        self._found = []

    def add(self, row: PreparedRow, losses: list[Tensor]) -> None:
        """Take the losses of the learnt positions of a row, in order, as the head gave them."""
        if losses:
            self._found.append((row.samples, torch.cat(losses)))

    def sums(self) -> dict[str, tuple[float, int]]:
        """Return the loss and the learnt tokens of each source; what does not add up is left out.

        Objectives that send other positions to the head than the labelled ones say nothing here.
        """
        totals: dict[str, tuple[float, int]] = {}
        for samples, losses in self._found:
            counts = [sample.num_labels for sample in samples]
            if sum(counts) != losses.numel():
                continue
            means = torch.stack([piece.sum() for piece in losses.split(counts)]).tolist()
            for sample, loss, count in zip(samples, means, counts, strict=True):
                before = totals.get(sample.source, (0.0, 0))
                totals[sample.source] = (before[0] + loss, before[1] + count)
        return totals


def by_source(
    sums: dict[str, tuple[float, int]], gather: Callable[[list[Any]], list[Any]]
) -> dict[str, float]:
    """Return the mean loss of a token of each source, over all ranks; every rank calls this.

    >>> by_source({"b": (6.0, 3), "a": (1.0, 2), "c": (0.0, 0)}, lambda values: values)
    {'a': 0.5, 'b': 2.0}
    """
    totals: dict[str, tuple[float, int]] = {}
    for name, loss, count in gather([(name, *sum_) for name, sum_ in sums.items()]):
        before = totals.get(name, (0.0, 0))
        totals[name] = (before[0] + loss, before[1] + count)
    return {name: loss / count for name, (loss, count) in sorted(totals.items()) if count}


class Tally:
    """Adds up the steps of a stage.

    Args:
        model: What learns; frozen as the stage has it.
        engine: The processes.
        objective: What is learnt.
    """

    def __init__(self, model: Any, engine: Engine, objective: Objective) -> None:
        self._engine = engine
        # A stock class taken whole does not say which of its layers see a picture; other objectives
        # leave parts of the model out, or run them more than once.
        counted = isinstance(objective, NextToken) and not isinstance(model, WholeModel)
        self.costs: Costs | None = costs_of(model) if counted else None
        """What samples cost; None where it cannot be counted."""
        rate, self.rate_source = peak_rate(engine.device, model.dtype)
        self._rate = rate * engine.world
        self.flops = self.seconds = 0.0
        self.room = self.padding = 0.0
        self.steps = 0
        self.peak_bytes = 0
        self.sources: dict[str, float] = {}

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold."""
        names = ("flops", "seconds", "room", "padding", "steps", "peak_bytes", "sources")
        return {name: getattr(self, name) for name in names}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        for name, value in state.items():
            setattr(self, name, value)

    def take(
        self,
        step: Step,
        sources: dict[str, float],
        *,
        seconds: float,
        padding: float,
        encoded: float,
    ) -> dict[str, Any]:
        """Count one step; return what the log says of it. Every rank calls this.

        Args:
            step: The rows of this rank.
            sources: The loss of each source over all ranks.
            seconds: What the step took.
            padding: Share of the positions that hold nothing.
            encoded: Share of the pictures that the encoder had to see.
        """
        numbers: dict[str, Any] = {"memory_gib": round(self._memory() / 2**30, 3)}
        samples = [sample for row in step.rows for sample in row.samples]
        if self.costs is not None:
            tiles = sum(sample.num_tiles for sample in samples)
            mine = self.costs.of(samples, encoded=round(tiles * encoded))
            flops = self._engine.add_up([mine])[0]
            self.flops += flops
            numbers["mfu"] = flops / max(seconds, 1e-9) / self._rate
        self.seconds += seconds
        self.room += 1.0 - step.num_tokens / max(step.capacity_tokens, 1)
        self.padding += padding
        self.steps += 1
        for name, loss in sources.items():
            before = self.sources.get(name, loss)
            self.sources[name] = _KEPT * before + (1 - _KEPT) * loss
        if sources:
            numbers["loss_by_source"] = sources
        return numbers

    def _memory(self) -> int:
        """Return the most memory so far: of the device, or of this process on a CPU."""
        if self._engine.device.type == "cuda":
            now = int(torch.cuda.max_memory_allocated(self._engine.device))
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        self.peak_bytes = max(self.peak_bytes, now)
        return self.peak_bytes

    def facts(self) -> dict[str, Any]:
        """Return what the model card says of the stage."""
        if not self.steps:
            return {}
        found: dict[str, Any] = {
            "room": self.room / self.steps,
            "padding": self.padding / self.steps,
            "peak_gib": round(self.peak_bytes / 2**30, 2),
            "loss_by_source": {name: round(loss, 4) for name, loss in self.sources.items()},
        }
        if self.costs is not None:
            found["mfu"] = self.flops / max(self.seconds, 1e-9) / self._rate
            found["mfu_against"] = self.rate_source
        return found
