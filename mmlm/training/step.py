"""One optimiser step: add up the gradients of its rows on all ranks, and move the weights.

Every loss is divided by what is learnt in the whole step on all ranks, so that micro-batches,
ranks and packing change nothing. That is also why a row may be cut in half when memory runs out:
the step is repeated with halves, and nothing else changes. Where ranks have to stay in step, a
rank without a row computes on one that stands in, of which nothing is learnt. Which rows a step
has, and when a stage ends, is no concern of this module.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mmlm.connectors import Remembering
from mmlm.data.order import key_of
from mmlm.data.pipeline import PreparedRow, Step
from mmlm.errors import TrainingError
from mmlm.modeling.head import watched_losses
from mmlm.training.batches import Batcher
from mmlm.training.nonfinite import save_batch
from mmlm.training.objectives import Objective
from mmlm.training.optim import Optimizer
from mmlm.training.recipe import StageConfig
from mmlm.training.rows import halves, with_picture
from mmlm.training.shared import Run
from mmlm.training.tally import SourceLosses


@dataclass(frozen=True)
class Learnt:
    """What a step found and did.

    Args:
        loss: Over all ranks; None if no token of the step is learnt.
        norm: The length of the gradient, before it was shortened.
        moved: False if loss or gradient were not a number, so that the weights stand still.
    """

    loss: float | None
    norm: float = 0.0
    moved: bool = False


class StepLearner:
    """Takes the steps of one stage.

    Args:
        run: What the stages share.
        stage: What this stage learns.
        objective: Gives the loss.
        optimizer: Moves what learns.
        batcher: Makes the inputs of the model.
        say: Tells a person what happened.
        stand_in: What a rank without a row computes on, where ranks stay in step.
        every_row_has_pictures: Whether a row without one gets that of `stand_in`.
    """

    def __init__(
        self,
        run: Run,
        stage: StageConfig,
        objective: Objective,
        optimizer: Optimizer,
        batcher: Batcher,
        say: Callable[[str], None],
        *,
        stand_in: PreparedRow | None = None,
        every_row_has_pictures: bool = False,
    ) -> None:
        self._stand_in, self._adds_pictures = stand_in, every_row_has_pictures
        self._run, self._stage, self._objective = run, stage, objective
        self._optimizer, self._batcher, self._say = optimizer, batcher, say
        parts = run.assistant.model.modules()
        self._remembering = [part for part in parts if isinstance(part, Remembering)]
        self.sources = SourceLosses()
        """The losses of the last step, by source."""
        self.cuts = 0
        """How often rows are cut in half, because memory ran out; part of a checkpoint."""

    def take(self, step: Step, number: int, factor: float) -> Learnt:
        """Learn from one step; `number` counts the steps before this one.

        Args:
            step: The rows of this rank.
            number: The place of the step in the stage, from 0.
            factor: On the peak rate.

        Raises:
            TrainingError: if the loss is not a number and such steps are not to be skipped, or
                memory does not suffice for a single sample.
        """
        counts = [self._objective.weigh(row.samples)[1] for row in step.rows]
        num_items = self._run.engine.add_up([sum(counts)])[0]
        if num_items == 0:
            return Learnt(None)
        loss = self._add_up(step, number, num_items)
        while loss is None:
            self._cut_further(step, number)
            loss = self._add_up(step, number, num_items)
        finite = math.isfinite(loss)
        norm, moved = self._optimizer.step(factor, self._stage.max_grad_norm, may_move=finite)
        while finite and not moved and self._optimizer.step_again():
            self._add_up(step, number, num_items)
            norm, moved = self._optimizer.step(factor, self._stage.max_grad_norm, may_move=True)
        if not moved:
            self._keep_broken(step, number + 1, loss, norm)
        for part in self._remembering if moved else ():
            part.after_step()
        return Learnt(loss, norm, moved)

    def _add_up(self, step: Step, number: int, num_items: float) -> float | None:
        """Add up the gradients of all rows; return the loss, or None if memory ran out."""
        run, engine = self._run, self._run.engine
        # Dropout hangs on the step and the rank alone, so that a run that goes on drops the same.
        torch.manual_seed(key_of(run.recipe.run.seed, self._stage.name, number, engine.rank))
        for part in self._remembering:
            part.before_step()
        total, ran_out = 0.0, False
        try:
            total = self._passes(self._rows(step), num_items)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if engine.in_step:
                raise self._told_to_shrink(error) from error
            ran_out = True
        if engine.in_step or not engine.any(ran_out):
            return engine.add_up([total])[0]
        self._optimizer.forget()
        gc.collect()
        if engine.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _rows(self, step: Step) -> list[PreparedRow | None]:
        """Return the rows of which something is learnt, cut, and filled up to those of others."""
        pieces: list[PreparedRow | None] = []
        for row in step.rows:
            pieces += halves(row, self.cuts)
        pieces = [row for row in pieces if row and self._objective.weigh(row.samples)[1]]
        if self._run.engine.in_step:
            most = self._run.engine.most(len(pieces))
            pieces += [None] * (most - len(pieces))
        return pieces

    def _passes(self, rows: list[PreparedRow | None], num_items: float) -> float:
        run, device = self._run, self._run.engine.device
        total = torch.zeros((), dtype=torch.float32, device=device)
        self.sources.forget()
        for index, given in enumerate(rows):
            row = given or self._stand_in
            assert row is not None
            if self._adds_pictures and self._stand_in is not None:
                row = with_picture(row, self._stand_in)
            factors = self._objective.weigh(row.samples)[0]
            with run.precision.context(device), watched_losses() as losses:
                inputs = self._batcher.inputs(row, factors)
                loss = self._optimizer.loss_of(
                    self._objective,
                    run.assistant.model,
                    inputs,
                    num_items,
                    is_last=index == len(rows) - 1,
                )
                if given is None:
                    loss = loss * 0.0
            if given is not None:
                self.sources.add(given, losses)
            self._optimizer.backward(loss)
            total += loss.detach().float()
            del inputs, loss
        return float(total)

    def _cut_further(self, step: Step, number: int) -> None:
        most = max((len(row.samples) for row in step.rows), default=1)
        most = self._run.engine.most(most)
        if 2**self.cuts >= most:
            raise TrainingError(
                f"Memory ran out in step {number + 1} of stage {self._stage.name}, with one sample "
                f"at a time. Set run.gradient_checkpointing, lower run.row_tokens, or spread the "
                f"model over several devices with run.sharding fsdp2."
            )
        self.cuts += 1
        self._say(
            f"memory ran out in step {number + 1}: rows are cut into {2**self.cuts} pieces from "
            f"here on, and the step is repeated; the loss is the same"
        )

    def _told_to_shrink(self, error: BaseException) -> TrainingError:
        """Ranks that wait for one another cannot repeat a step that one of them has lost."""
        tokens = self._run.recipe.run.row_tokens or 4096
        return TrainingError(
            f"Memory ran out under sharding {self._run.engine.sharding}, where all ranks compute "
            f"in step and none can repeat alone ({error}). Begin again with shorter rows: "
            f"run.row_tokens={tokens // 2}; or with run.gradient_checkpointing=true."
        )

    def _keep_broken(self, step: Step, number: int, loss: float, norm: float) -> None:
        """Write down the samples of a step that could not be learnt; stop, unless told to skip."""
        place = self._run.out / "nonfinite" / f"{self._stage.name}-step-{number}"
        save_batch(place, step, self._batcher, rank=self._run.engine.rank, loss=loss)
        if self._run.recipe.run.on_nonfinite == "stop":
            raise TrainingError(
                f"The loss of step {number} of stage {self._stage.name} is {loss} and its "
                f"gradient has length {norm}. The samples are saved in {place}. Lower "
                f"stages.{self._stage.name}.peak_lr, or set run.on_nonfinite: skip."
            )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a device or on the machine."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return "out of memory" in text or "can't allocate memory" in text


def padding_share(step: Step) -> float:
    """Share of the positions of this rank's rows that hold nothing, if each row is padded."""
    padded = sum(
        len(row.samples) * max(s.num_tokens for s in row.samples)
        for row in step.rows
        if row.samples
    )
    return 1.0 - sum(row.num_tokens for row in step.rows) / padded if padded else 0.0
