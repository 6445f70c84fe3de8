"""One stage of a run: from a loaded model to a trained one, step by step, and never lost.

A stage reads its steps from the stream, lets `step` learn from each, tells how it goes, and
saves. After every step it can be stopped and gone on with to the same bits. What the stages
share is in `shared`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from mmlm.data import Quarantine
from mmlm.data.mixture import Mixture
from mmlm.data.packing import Row
from mmlm.data.pipeline import PreparedRow, Step, StepStream
from mmlm.data.planning import Planner
from mmlm.data.ranks import steps_of_rank
from mmlm.errors import DataError, TrainingError
from mmlm.training.batches import Batcher
from mmlm.training.channels import channel_dropout
from mmlm.training.checkpoint import (
    Checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
)
from mmlm.training.depth import drop_path
from mmlm.training.display import Progress, flat
from mmlm.training.feature_cache import FeatureCache, TrunkCache
from mmlm.training.learning import freeze, public_name
from mmlm.training.objectives import objectives, planner_of
from mmlm.training.optim import stable_name
from mmlm.training.recipe import StageConfig
from mmlm.training.result import StageResult
from mmlm.training.rows import stand_in, two_words
from mmlm.training.schedules import rate
from mmlm.training.sharding import build_optimizer, check_objective, whole_passes
from mmlm.training.shared import Run, packing_of
from mmlm.training.step import Learnt, StepLearner, padding_share
from mmlm.training.tally import Tally, by_source
from mmlm.training.validation import Validation
from mmlm.vision import VisionEncoder
from mmlm.whole import WholeModel

_LOSSES_KEPT = 5


class StageRun:
    """Runs one stage.

    Args:
        run: What the stages share.
        stage: What this stage learns.
        number: Its place among the stages, from 0.
        mixture: Its opened data.
        cache: Features of a frozen encoder, or of the layers of it that stand still, or None.
        checkpoint: From where to go on; None begins the stage.
    """

    def __init__(
        self,
        run: Run,
        stage: StageConfig,
        number: int,
        mixture: Mixture,
        *,
        cache: FeatureCache | None,
        checkpoint: Checkpoint | None,
    ) -> None:
        self.run, self.stage, self.mixture, self.cache = run, stage, mixture, cache
        self.folder = run.out / "checkpoints" / stage.name
        self.title = f"{stage.name} ({number + 1} of {len(run.recipe.stages)})"
        torch.manual_seed(run.recipe.run.seed + number)
        self.model: Any = run.assistant.model
        self.reports = freeze(self.model, stage.patterns)
        set_modes(self.model, learning=False)
        self.objective = objectives.read(
            stage.objective, origin=f"stages.{stage.name}.objective"
        ).build(loss_weight=stage.loss_weight)
        check_objective(self.objective, run, stage)
        self.objective.prepare(self.model, run.assistant.processor.tokenizer, mixture)
        self.tally = Tally(self.model, run.engine, self.objective)  # before its weights are spread
        self._trunk = cache.trunk if isinstance(cache, TrunkCache) else None
        self.optimizer = build_optimizer(
            run, stage, vision_stands_aside=self._trunk is None and cache is not None
        )
        self.batcher = Batcher(
            self.model,
            run.assistant.processor,
            packed=run.attention.packed,
            cache=cache,
            device=run.engine.device,
        )
        self.progress = Progress(self.title, quiet=True)
        idle = self._stand_in()
        self.learner = StepLearner(
            run, stage, self.objective, self.optimizer, self.batcher,
            say=lambda text: self.progress.say(f"  {text}"), stand_in=idle,
            every_row_has_pictures=isinstance(self.model, WholeModel),
        )  # fmt: skip
        self.quarantine = Quarantine(run.quarantine_path, budget=run.recipe.run.drop_budget)
        self.step, self.tokens, self.samples, self.seconds = 0, 0, 0, 0.0
        self.losses: list[float] = []
        self.num_skipped = 0
        self._asked = -1
        self._stream_state: dict[str, Any] | None = None
        self.validation = Validation.of(run, stage, self.objective, cache, idle)
        if checkpoint is not None:
            self._go_on_from(checkpoint)
        self._last_saved = time.monotonic()
        self._saved_step = self.step

    @property
    def num_samples(self) -> int | None:
        """How many samples the stage looks at, if that is known."""
        until = self.stage.until
        if until.epochs is not None:
            return max(1, round(until.epochs * self.mixture.epoch_rows))
        return until.samples

    def _go_on_from(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        found = self.mixture.fingerprint()
        if state["data"] != found:
            raise TrainingError(
                f"The data of stage {self.stage.name} have changed since {self.folder} was "
                f"written, so the run cannot go on exactly. Bring the old data back, or begin anew "
                f"with --fresh."
            )
        self.optimizer.restore(checkpoint.optimizer)
        restore_random_state(checkpoint.random)
        self.learner.cuts = state["cuts"]
        self.quarantine.restore(state["quarantine"])
        self.step, self.tokens = state["step"], state["tokens"]
        self.samples, self.seconds = state["samples"], state["seconds"]
        self.losses, self.num_skipped = state["losses"], state["skipped"]
        self._asked = state.get("asked", -1)
        self._stream_state = state["stream"]
        self.tally.restore(state.get("tally", {}))
        if self.validation is not None:
            self.validation.restore(state["validation"])

    def go(self) -> StageResult:
        """Take steps until the stage ends; save and return early if the run is to stop.

        Raises:
            ConfigError: if layers of an encoder that stands still are to be left out.
            DataError: if too many samples cannot be used.
            TrainingError: if the loss is not a number.
        """
        parts = self.model.model
        with (
            drop_path(parts.vision, self.stage.drop_path),
            channel_dropout(parts.connector, self.stage.feature_dropout),
            nullcontext() if self._trunk is None else self._trunk.installed(),
        ):
            return self._go()

    def _go(self) -> StageResult:
        self.progress = progress = Progress(self.title, quiet=self.run.quiet)
        progress.begin_at(self._share(self.step, self.tokens, self.samples))
        try:
            if self.step == 0:
                self._ask(progress)
                self._validate(progress)
            started = time.monotonic()
            for step in self._stream():
                self._count(step)
                if step.num_rows:
                    self._take(step, progress)
                    self.seconds += time.monotonic() - started
                    started = time.monotonic()
                self._stream_state = step.state
                if self._is_over():
                    break
                self._save_if_due()
                started = time.monotonic()
                if self.run.stop:
                    return self._result()
        finally:
            progress.close()
        if self.step == 0:
            raise DataError(
                f"Stage {self.stage.name} found no sample to learn from.\n{self.quarantine.table()}"
            )
        self._finish()
        return self._result()

    def _stream(self) -> Iterable[Step]:
        run, engine = self.run, self.run.engine
        packing, rows_per_step = packing_of(run.recipe, self.stage, packed=run.attention.packed)
        # The planning thread has a tokenizer of its own: a fast one may not be used by two.
        processor = copy.deepcopy(run.assistant.processor)

        def make(mixture: Mixture, **words: Any) -> StepStream:
            planner = self._planner(mixture, processor)
            pixels, threads = self.batcher.pixels, run.recipe.run.threads
            return StepStream(
                planner, packing, pixels=pixels, threads=threads, cost=self._cost_of_row, **words
            )

        return steps_of_rank(
            make,
            self.mixture,
            rows_per_step=rows_per_step,
            num_samples=self.num_samples,
            rank=engine.rank,
            world=engine.world,
            state=self._stream_state,
            gather=engine.gather,
        )

    def _cost_of_row(self, row: Row) -> float:
        """Estimate what a row costs: its operations where they can be counted, else its tokens."""
        costs = self.tally.costs
        if costs is None:
            return float(row.num_tokens)
        return costs.of(row.samples, encoded=row.num_tiles if self.cache is None else 0)

    def _planner(self, mixture: Mixture, processor: Any) -> Planner:
        """Return what turns rows of data into samples."""
        run = self.run
        packing, _ = packing_of(run.recipe, self.stage, packed=run.attention.packed)
        return planner_of(self.stage.objective)(
            mixture, processor, max_tokens=packing.row_tokens, max_tiles=packing.max_tiles,
            max_patches=packing.max_patches, share=run.attention.shares,
        )  # fmt: skip

    def _stand_in(self) -> PreparedRow | None:
        """Return what a rank without a row computes on, where ranks stay in step."""
        if not self.run.engine.in_step:
            return None
        kind = "picture" if isinstance(self.model, WholeModel) else self.objective.stand_in
        if kind == "words":
            return two_words()
        return stand_in(
            self._planner(self.mixture, self.run.assistant.processor).plan,
            self.mixture.epoch_rows,
            suits=lambda one: (
                self.objective.weigh([one])[1] > 0 and (kind == "sample" or bool(one.images))
            ),
            opened=self.batcher.pixels,
        )

    def _count(self, step: Step) -> None:
        """Count and write down what was left out, on whichever rank that showed."""
        self.samples = step.consumed
        drops = step.drops_of_all(self.run.engine.gather) if step.num_rows else step.drops
        self.quarantine.record(drops, seen=step.num_seen, expected=self.num_samples)

    def _take(self, step: Step, progress: Progress) -> None:
        """Learn from one step, and tell."""
        before = self._share(self.step, self.tokens, self.samples - step.num_samples)
        after = self._share(self.step + 1, self.tokens + step.num_tokens, self.samples)
        factor = rate(self.stage, progress=(before + after) / 2, step=self.step)
        begun, known = time.monotonic(), self._pictures()
        learnt = self._learn(step, factor)
        self.step += 1
        self.tokens += step.num_tokens
        if learnt.loss is None:
            return
        self._remember(learnt.loss, moved=learnt.moved)
        rate_now = factor * max(self.stage.patterns.values()) if learnt.moved else 0.0
        seconds = time.monotonic() - begun
        padding = 0.0 if self.run.attention.packed else padding_share(step)
        seen = self.tally.take(
            step,
            by_source(self.learner.sources.sums(), self.run.engine.gather),
            seconds=seconds,
            padding=padding,
            encoded=self._encoded(known),
        )
        self._tell(step, learnt, rate_now, after, seconds, progress, {"padding": padding, **seen})
        if self.run.growth is not None and self.run.growth.is_due(self.step, before, after):
            self._ask(progress)
            self._asked = self.step
        if self.validation is not None and self.validation.is_due(self.step):
            self._validate(progress)

    def _pictures(self) -> tuple[int, int]:
        """Return how many pictures came from the cache so far, and how many did not."""
        return (0, 0) if self.cache is None else (self.cache.hits, self.cache.misses)

    def _encoded(self, before: tuple[int, int]) -> float:
        """Return the share of the step's pictures that the encoder had to see.

        The layers above a trunk see all of them; they are left out here, so that the use of the
        machine is told too low rather than too high.
        """
        hits, misses = (now - then for now, then in zip(self._pictures(), before, strict=True))
        return misses / (hits + misses) if hits + misses else 1.0

    def _learnt(self) -> dict[str, Tensor]:
        """Return what learns in this stage, whole, on the first rank; called on every rank."""
        is_main = self.run.engine.is_main
        # Both are asked on every rank: to list its state, too, a spread model moves weights.
        weights, statistics = self.optimizer.masters(keep=is_main), self._statistics()
        return {**weights, **statistics} if is_main else {}

    def _validate(self, progress: Progress) -> None:
        """Measure the rows that are never learnt."""
        if self.validation is not None:
            progress.say(self.validation.round(self.step, self._learnt))

    def _learn(self, step: Step, factor: float) -> Learnt:
        return self.learner.take(step, self.step, factor)

    def _remember(self, loss: float, *, moved: bool) -> None:
        if not moved:
            self.num_skipped += 1
            return
        self.losses.append(loss)
        if len(self.losses) > 2 * _LOSSES_KEPT:
            del self.losses[_LOSSES_KEPT]

    def _tell(
        self,
        step: Step,
        learnt: Learnt,
        lr: float,
        share: float,
        seconds: float,
        progress: Progress,
        seen: dict[str, Any],
    ) -> None:
        """Write one line of the log, and show it."""
        if not self.run.engine.is_main or learnt.loss is None:
            return
        numbers: dict[str, Any] = {
            "loss": learnt.loss,
            "lr": lr,
            "grad_norm": learnt.norm,
            "tokens": step.num_tokens,
            "useful_tokens_per_second": step.num_tokens / max(seconds, 1e-9),
            "samples": self.samples,
            "dropped": self.quarantine.dropped,
            "room": 1.0 - step.num_tokens / max(step.capacity_tokens, 1),
            "share": share,
            "seconds": seconds,
            "seconds_left": progress.left(share),
            **seen,
        }
        self.run.log.write({"stage": self.stage.name, "step": self.step, **numbers})
        for tracker in self.run.trackers:
            tracker.log(flat({"step": self.step, **numbers}, f"{self.stage.name}/"), self.step)
        progress.step(
            step=self.step, share=share, loss=learnt.loss, tokens=step.num_tokens,
            padding=seen["padding"], mfu=seen.get("mfu"), memory_gib=seen["memory_gib"],
            dropped=self.quarantine.dropped,
        )  # fmt: skip

    def _ask(self, progress: Progress) -> None:
        growth = self.run.growth
        engine = self.run.engine
        if growth is None or not (engine.is_main or engine.in_step):
            return
        with whole_passes(self.model, engine):
            answers = growth.ask(stage=self.stage.name, step=self.step, samples=self.samples)
        if answers:
            shown = " · ".join(answer.strip().replace("\n", " ")[:40] for answer in answers)
            progress.say(f"  step {self.step:,} answers: {shown}")

    def _share(self, step: int, tokens: int, samples: int) -> float:
        """How much of the stage is done."""
        until = self.stage.until
        if until.steps is not None:
            return step / until.steps
        if until.tokens is not None:
            return tokens / until.tokens
        return samples / (self.num_samples or 1)

    def _is_over(self) -> bool:
        until = self.stage.until
        if self.validation is not None and self.validation.is_over:
            return True
        if until.steps is not None:
            return self.step >= until.steps
        return until.tokens is not None and self.tokens >= until.tokens

    def _save_if_due(self) -> None:
        config = self.run.recipe.run
        minutes = (time.monotonic() - self._last_saved) / 60
        by_step = config.checkpoint_every is not None and self.step % config.checkpoint_every == 0
        due = self.run.stop or by_step or minutes >= config.checkpoint_minutes
        if self.run.engine.any(due) and self.step != self._saved_step:
            self.run.stop = self.run.engine.any(self.run.stop)
            self.save(finished=False)

    def save(self, *, finished: bool) -> None:
        """Write a checkpoint; the other ranks give what they hold, and wait for the first."""
        is_main = self.run.engine.is_main
        learnt = self._learnt()
        moments = {} if finished else self.optimizer.state(keep=is_main)
        if is_main:
            save_checkpoint(
                self.folder,
                Checkpoint(
                    state=self._state(finished),
                    weights={**self.run.masters, **learnt},
                    optimizer=moments,
                    random=random_state(),
                ),
                keep=self.run.recipe.run.keep_checkpoints,
            )
            if self.validation is not None:
                self.validation.forget_worse()
        self.run.engine.wait()
        self._last_saved, self._saved_step = time.monotonic(), self.step

    def _state(self, finished: bool) -> dict[str, Any]:
        return {
            "stage": self.stage.name,
            "step": self.step,
            "finished": finished,
            "tokens": self.tokens,
            "samples": self.samples,
            "seconds": self.seconds,
            "losses": self.losses,
            "skipped": self.num_skipped,
            "asked": self._asked,
            "cuts": self.learner.cuts,
            "stream": self._stream_state,
            "tally": self.tally.state(),
            "data": self.mixture.fingerprint(),
            "quarantine": self.quarantine.state(),
            "log_bytes": self.run.log.length,
            "validation": None if self.validation is None else self.validation.state(),
            "growth_bytes": 0 if self.run.growth is None else self.run.growth.log.length,
            "result": asdict(self._result()),
        }

    def _statistics(self) -> dict[str, Tensor]:
        """Return the buffers of parts that learn, such as the averages of batch norms."""
        learning = {r.part for r in self.reports if r.learning}
        kept = set(self.model.state_dict())
        return {
            stable_name(name): value
            for name, value in self.model.named_buffers()
            if name in kept and public_name(name).split(".")[0] in learning
        }

    def _finish(self) -> None:
        self._validate(Progress(self.title, quiet=True))
        if self.validation is not None:
            self.validation.put_best_back(self.optimizer, self.step)
        if self.run.growth is not None and self._asked != self.step:
            self._ask(Progress(self.title, quiet=True))
        if not self.run.engine.in_step:
            self.run.masters |= {n: t.detach() for n, t in self.optimizer.masters().items()}
        self.save(finished=True)
        self.optimizer.close()

    def _result(self) -> StageResult:
        head, tail = self.losses[:_LOSSES_KEPT], self.losses[-_LOSSES_KEPT:]
        return StageResult(
            name=self.stage.name,
            steps=self.step,
            samples=self.samples,
            dropped=self.quarantine.dropped,
            tokens=self.tokens,
            seconds=round(self.seconds, 1),
            first_loss=sum(head) / len(head) if head else None,
            last_loss=sum(tail) / len(tail) if tail else None,
            learning=sum(report.learning for report in self.reports),
            validation_loss=None if self.validation is None else self.validation.best_loss,
            best_step=None if self.validation is None else self.validation.best_step,
            seen=self.tally.facts(),
        )


def set_modes(module: nn.Module, *, learning: bool) -> None:
    """Put modules that hold something that learns into training mode, and all others out of it.

    What has no weights, such as a dropout, goes with the module that it stands in. The batch norms
    of an encoder stand still: what is computed of a picture must not depend on the others of its
    batch.
    """
    own = [parameter.requires_grad for parameter in module.parameters()]
    module.training = any(own) if own else learning
    for child in module.children():
        set_modes(child, learning=module.training)
    if isinstance(module, VisionEncoder):
        module.hold_batch_norms()
