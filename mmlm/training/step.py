"""One optimiser step: add up the gradients of its rows on all ranks, and move the weights.

Every loss is divided by what is learnt in the whole step on all ranks, so that micro-batches,
ranks and packing change nothing. Which rows a step has, and when a stage ends, is no concern
of this module.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mmlm.data.order import key_of
from mmlm.data.pipeline import Step
from mmlm.errors import TrainingError
from mmlm.training.batches import Batcher
from mmlm.training.nonfinite import save_batch
from mmlm.training.objectives import Objective
from mmlm.training.optim import MasterAdamW
from mmlm.training.recipe import StageConfig
from mmlm.training.shared import Run


@dataclass(frozen=True)
class Learnt:
    """What a step found: the loss over all ranks and the length of the gradient.

    Args:
        loss: None if no token of the step is learnt.
        norm: Before it was shortened.
    """

    loss: float | None
    norm: Tensor

    @property
    def is_finite(self) -> bool:
        """Whether the weights may be moved."""
        return self.loss is not None and math.isfinite(self.loss) and bool(self.norm.isfinite())


class StepLearner:
    """Takes the steps of one stage.

    Args:
        run: What the stages share.
        stage: What this stage learns.
        objective: Gives the loss.
        optimizer: Moves what learns.
        batcher: Makes the inputs of the model.
    """

    def __init__(
        self,
        run: Run,
        stage: StageConfig,
        objective: Objective,
        optimizer: MasterAdamW,
        batcher: Batcher,
    ) -> None:
        self._run, self._stage, self._objective = run, stage, objective
        self._optimizer, self._batcher = optimizer, batcher

    def learn(self, step: Step, number: int) -> Learnt:
        """Add up the gradients of all rows; `number` counts the steps before this one."""
        weighed = [self._objective.weigh(row.samples) for row in step.rows]
        engine = self._run.engine
        # Dropout hangs on the step and the rank alone, so that a run that goes on drops the same.
        torch.manual_seed(key_of(self._run.recipe.run.seed, self._stage.name, number, engine.rank))
        num_items = engine.add_up([sum(count for _, count in weighed)])[0]
        total = torch.zeros((), dtype=torch.float32, device=engine.device)
        if num_items == 0:
            return Learnt(None, total)
        for row, (factors, count) in zip(step.rows, weighed, strict=True):
            if count == 0:
                continue
            with self._run.precision.context(engine.device):
                inputs = self._batcher.inputs(row, factors)
                loss = self._objective.loss(self._run.assistant.model, inputs, num_items)
            # A row of text alone reaches nothing that learns while only the connector does.
            if loss.requires_grad:
                loss.backward()
                self._optimizer.collect()
            total += loss.detach().float()
        engine.add_up_gradients(self._optimizer.gradients())
        norm = self._optimizer.clip(self._stage.max_grad_norm)
        return Learnt(engine.add_up([float(total)])[0], norm)

    def move(self, step: Step, number: int, learnt: Learnt, factor: float) -> bool:
        """Move the weights, unless the loss or the gradient is not a number; say if they moved.

        Raises:
            TrainingError: if it is not a number, and the recipe does not say to skip such steps.
        """
        if learnt.is_finite:
            self._optimizer.step(factor)
            return True
        self._optimizer.forget()
        loss, norm = learnt.loss or 0.0, learnt.norm
        place = self._run.out / "nonfinite" / f"{self._stage.name}-step-{number}"
        save_batch(place, step, self._batcher, rank=self._run.engine.rank, loss=loss)
        if self._run.recipe.run.on_nonfinite == "stop":
            raise TrainingError(
                f"The loss of step {number} of stage {self._stage.name} is {loss} and its "
                f"gradient has length {float(norm)}. The samples are saved in {place}. Lower "
                f"stages.{self._stage.name}.peak_lr, or set run.on_nonfinite: skip."
            )
        return False


def padding_share(step: Step) -> float:
    """Share of the positions of this rank's rows that hold nothing, if each row is padded."""
    padded = sum(
        len(row.samples) * max(s.num_tokens for s in row.samples)
        for row in step.rows
        if row.samples
    )
    return 1.0 - sum(row.num_tokens for row in step.rows) / padded if padded else 0.0
