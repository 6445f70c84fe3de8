"""Rows that are never learnt: their loss while a stage learns, the best weights, an early end.

    stage ──► every N steps ──► the objective's loss on the validation rows ──► log.jsonl
                                is it the lowest so far?  ──► checkpoints/STAGE/best-…
                                not for `patience` rounds? ──► the stage ends

Measuring changes nothing: no gradients, random numbers and modes are put back, the rows and their
order are always the same. What was found is part of every checkpoint, so a run that goes on ends
in the same bits. Sample answers are asked by `mmlm.training.callbacks`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmlm.data import Packer, Quarantine
from mmlm.data.mixture import Mixture
from mmlm.data.packing import PackingConfig, Row
from mmlm.data.pipeline import PreparedRow
from mmlm.data.planning import Planned, Planner
from mmlm.data.schema import Drop
from mmlm.errors import DataError, ImageError, TrainingError
from mmlm.processing import MMLMProcessor
from mmlm.storage import atomic_folder
from mmlm.training.batches import Batcher
from mmlm.training.checkpoint import random_state, restore_random_state
from mmlm.training.objectives import Objective, planner_of
from mmlm.training.optim import Optimizer, stable_name
from mmlm.training.recipe import StageConfig, ValidationConfig

if TYPE_CHECKING:
    from mmlm.training.feature_cache import FeatureCache
    from mmlm.training.shared import Run

_WEIGHTS = "weights.safetensors"


def plan_rows(
    mixture: Mixture,
    processor: MMLMProcessor,
    packing: PackingConfig,
    *,
    most: int,
    budget: float,
    planner: type[Planner] | None = None,
) -> tuple[list[Row], Quarantine]:
    """Plan and pack validation rows, spread evenly over the data.

    Args:
        mixture: The opened data, not shuffled.
        processor: Counts tokens.
        packing: How samples share rows.
        most: So many samples at most.
        budget: Largest share of samples that may be unusable.
        planner: What makes samples of rows, if not `Planner`.

    Returns:
        The packed rows, and what was left out.

    Raises:
        DataError: if too many samples cannot be used, or none can.
    """
    plans = (planner or Planner)(
        mixture, processor, max_tokens=packing.row_tokens, max_tiles=packing.max_tiles
    )
    count = min(most, mixture.epoch_rows)
    planned = [plans.plan(index * mixture.epoch_rows // count) for index in range(count)]
    drops = [one for one in planned if isinstance(one, Drop)]
    quarantine = Quarantine(None, budget=budget)
    quarantine.record(drops, seen=count)
    packer, rows = Packer(packing), list[Row]()
    for one in planned:
        if not isinstance(one, Drop):
            rows += packer.add(one)
    rows += packer.flush()
    if not rows:
        raise DataError(f"Not one validation row can be used.\n{quarantine.table()}")
    return rows, quarantine


class Validation:
    """The validation of one stage.

    Args:
        run: What the stages share.
        config: How often, and what follows.
        stage: The name of the stage.
        objective: What the stage learns.
        packing: How its samples share rows.
        folder: Where its checkpoints are.
        cache: Features of a frozen encoder, or None.
        planner: What makes samples of rows, if not `Planner`.
        stand_in: What a rank without a row computes on, where ranks stay in step.
    """

    def __init__(
        self,
        run: Run,
        config: ValidationConfig,
        *,
        stage: str,
        objective: Objective,
        packing: PackingConfig,
        folder: Path,
        cache: FeatureCache | None,
        planner: type[Planner] | None = None,
        stand_in: PreparedRow | None = None,
    ) -> None:
        self._stand_in = stand_in
        assert run.validation is not None
        self._run, self.config, self._stage = run, config, stage
        self._objective, self._folder = objective, folder
        self._fingerprint = run.validation.fingerprint()
        self._model: Any = run.assistant.model
        self._rows, _ = plan_rows(
            run.validation, run.assistant.processor, packing,
            most=config.samples, budget=run.recipe.run.drop_budget, planner=planner,
        )  # fmt: skip
        self._batcher = Batcher(
            self._model,
            run.assistant.processor,
            packed=run.attention.packed,
            cache=cache,
            device=run.engine.device,
        )
        self.best_loss: float | None = None
        self.best_step = 0
        self._last_step = -1
        self._waited = 0

    @classmethod
    def of(
        cls,
        run: Run,
        stage: StageConfig,
        objective: Objective,
        cache: FeatureCache | None,
        stand_in: PreparedRow | None = None,
    ) -> Validation | None:
        """Return the validation of a stage, or None where the recipe has none."""
        if run.recipe.validation is None or run.validation is None:
            return None
        from mmlm.training.shared import packing_of

        return cls(
            run,
            run.recipe.validation,
            stage=stage.name,
            objective=objective,
            packing=packing_of(run.recipe, stage, packed=run.attention.packed)[0],
            folder=run.out / "checkpoints" / stage.name,
            cache=cache,
            planner=planner_of(stage.objective),
            stand_in=stand_in,
        )

    def is_due(self, step: int) -> bool:
        """Whether the rows are measured after this step."""
        return step % self.config.every_steps == 0

    @property
    def is_over(self) -> bool:
        """Whether the stage ends, because the loss has not fallen for `patience` rounds."""
        return self.config.patience is not None and self._waited >= self.config.patience

    def round(self, step: int, weights: Callable[[], Mapping[str, Tensor]]) -> str:
        """Measure, write down, and keep the weights if they are the best so far.

        Args:
            step: The step just taken; measured once.
            weights: Gives what learns, by stable name; asked on every rank.

        Returns:
            A line for people; empty if this step was measured already.
        """
        if step == self._last_step:
            return ""
        loss, num_samples = self.measure()
        is_best = self.best_loss is None or loss < self.best_loss
        if is_best:
            self.best_loss, self.best_step, self._waited = loss, step, 0
            self._keep(step, weights)
        else:
            self._waited += 1
        self._last_step = step
        numbers = {"validation_loss": loss, "validation_samples": num_samples}
        if self._run.engine.is_main:
            self._run.log.write({"stage": self._stage, "step": step, **numbers, "best": is_best})
            for tracker in self._run.trackers:
                tracker.log({f"{self._stage}/validation_loss": loss}, step)
        best = (
            "the lowest so far" if is_best else f"lowest {self.best_loss:.4f} at {self.best_step}"
        )
        return f"  step {step:,} validation loss {loss:.4f} on {num_samples:,} samples, {best}"

    def measure(self) -> tuple[float, int]:
        """Return the loss over all rows of all ranks, and the number of samples.

        Raises:
            DataError: if nothing of them is learnt by the objective of this stage.
        """
        engine, total, items, samples = self._run.engine, 0.0, 0.0, 0
        threads = self._run.recipe.run.threads
        rows: list[Row | None] = list(self._rows[engine.rank :: engine.world])
        if engine.in_step:
            rows += [None] * (-(-len(self._rows) // engine.world) - len(rows))
        with _unchanged(self._model), torch.no_grad(), ThreadPoolExecutor(threads) as pool:
            # This one word makes the model run its vision part for rows of text alone, too.
            self._model.model.training = engine.in_step
            for row in rows:
                prepared = self._prepare([] if row is None else row.samples, pool)
                factors, count = self._objective.weigh(prepared.samples)
                if count == 0 and self._stand_in is None:
                    continue
                computed = prepared
                if count == 0 and self._stand_in is not None:
                    computed = self._stand_in
                    factors, _ = self._objective.weigh(computed.samples)
                with self._run.precision.context(engine.device):
                    inputs = self._batcher.inputs(computed, factors)
                    loss = self._objective.loss(self._model, inputs, 1.0)
                total, items = total + (float(loss) if count else 0.0), items + count
                samples += len(prepared.samples)
        total, items, seen = engine.add_up([total, items, float(samples)])
        if items == 0:
            raise DataError(
                f"Of the validation rows, stage {self._stage} learns nothing: its objective finds "
                f"no picture or no answer in them. Give `validation.data` rows like those of the "
                f"stage."
            )
        return total / items, int(seen)

    def _prepare(self, samples: list[Planned], pool: ThreadPoolExecutor) -> PreparedRow:
        """Open the pictures of a row; samples with a broken one are left out each time."""
        prepared = PreparedRow([], [])
        opened = [[pool.submit(self._batcher.pixels, i) for i in one.images] for one in samples]
        for sample, futures in zip(samples, opened, strict=True):
            try:
                images = [future.result() for future in futures]
            except (ImageError, OSError):
                continue
            prepared.samples.append(sample)
            prepared.images += images
        return prepared

    def _place(self, step: int) -> Path:
        return self._folder / f"best-{step:08d}"

    def _keep(self, step: int, weights: Callable[[], Mapping[str, Tensor]]) -> None:
        """Write the weights beside the checkpoints; the best before stays until the next one."""
        if self.config.keep != "best":
            return
        found = weights()
        if not self._run.engine.is_main:
            return
        plain = {name: one.detach().cpu().clone().contiguous() for name, one in found.items()}
        try:
            with atomic_folder(self._place(step)) as unfinished:
                save_file(plain, unfinished / _WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise TrainingError(
                f"The best weights so far could not be written: {error}. Free some space and run "
                f"the same command again, or set validation.keep: last."
            ) from error

    def forget_worse(self) -> None:
        """Delete weights that are no longer the best; called after each checkpoint."""
        for place in self._folder.glob("best-*"):
            if place != self._place(self.best_step):
                shutil.rmtree(place)

    def put_best_back(self, optimizer: Optimizer, step: int) -> bool:
        """Give the model its best weights, if those of the last step are not; say if it was so.

        Raises:
            TrainingError: if the best weights are gone.
        """
        if self.config.keep != "best" or self.best_loss is None or self.best_step == step:
            return False
        self._run.engine.wait()
        path = self._place(self.best_step) / _WEIGHTS
        try:
            weights = load_file(path)
        except (OSError, SafetensorError) as error:
            raise TrainingError(
                f"The best weights, of step {self.best_step} of stage {self._stage}, cannot be "
                f"read: {error}. Begin anew with --fresh, or set validation.keep: last."
            ) from None
        put_weights(self._model, optimizer, weights)
        return True

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold."""
        return {"loss": self.best_loss, "step": self.best_step, "waited": self._waited,
                "last": self._last_step, "data": self._fingerprint}  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a checkpoint.

        Raises:
            TrainingError: if the validation data have changed.
        """
        if state["data"] != self._fingerprint:
            raise TrainingError(
                "The validation data have changed since this run was begun, so its losses could "
                "not be compared. Bring the old data back, or begin anew with --fresh."
            )
        self.best_loss, self.best_step = state["loss"], state["step"]
        self._waited, self._last_step = state["waited"], state["last"]


def put_weights(model: nn.Module, optimizer: Optimizer, weights: Mapping[str, Tensor]) -> None:
    """Put weights into what learns, and statistics into the model."""
    optimizer.put(weights)
    with torch.no_grad():
        for name, holder in model.named_buffers():
            if stable_name(name) in weights:
                holder.copy_(weights[stable_name(name)])


@contextmanager
def _unchanged(model: nn.Module) -> Generator[None]:
    """Measure in evaluation mode, and put modes and random numbers back."""
    modes = {module: module.training for module in model.modules()}
    random = random_state()
    model.eval()
    try:
        yield
    finally:
        restore_random_state(random)
        for module, training in modes.items():
            module.training = training
