"""A whole run: compose the model, go through the stages, leave a folder behind.

    runs/NAME/  recipe.resolved.yaml   what was run, every value written out
                log.jsonl              one line a step
                growth.jsonl           answers on the same few pictures
                quarantine.jsonl       every sample left out, and why
                checkpoints/STAGE/     private, to go on from
                report.html  loss.svg  the run on a page
                model/  delta/         what was learnt
                result.json            how the stages went; written last

The same recipe again goes on where it was; a changed one is an error that says what changed.
"""

from __future__ import annotations

import copy
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from mmlm.assistant import Assistant, compose, load
from mmlm.data import open_mixture
from mmlm.data.mixture import Mixture
from mmlm.data.order import key_of
from mmlm.errors import CheckpointError, ConfigError, TrainingError
from mmlm.hub import upgrade
from mmlm.language.adapters import merge_adapters
from mmlm.language.routing import CANNOT_MERGE, is_routed
from mmlm.modeling.lean import keep_all, keep_less
from mmlm.recipes import find_recipe, list_recipes
from mmlm.training.adapting import check_stages
from mmlm.training.attention import choose_attention, set_attention
from mmlm.training.caching import Caches
from mmlm.training.callbacks import Growth, choose_questions
from mmlm.training.checkpoint import Checkpoint, delete_old, last_checkpoint, load_checkpoint
from mmlm.training.display import JsonLog, Tracker, open_trackers
from mmlm.training.feature_cache import TrunkCache
from mmlm.training.folder import RESULT, claim_folder
from mmlm.training.forecast import choose_sharding
from mmlm.training.learning import matching, table
from mmlm.training.memory import memory_here, plan_memory
from mmlm.training.optim import stable_name
from mmlm.training.parallel import Engine
from mmlm.training.precision import Precision, choose_precision
from mmlm.training.recipe import Recipe, StageConfig
from mmlm.training.result import RunResult, StageResult
from mmlm.training.sharding import bytes_of, layers_of
from mmlm.training.shared import Run, packing_of
from mmlm.training.sharing import with_sharing
from mmlm.training.stage import StageRun
from mmlm.whole import WholeModel


def find_data(name: str) -> Path:
    """Return the file of a data recipe: a mixture or a source.

    Raises:
        ConfigError: if neither has this name.
    """
    if name in list_recipes("mixtures"):
        return find_recipe("mixtures", name)
    if name in list_recipes("sources"):
        return find_recipe("sources", name)
    known = ", ".join([*list_recipes("mixtures"), *list_recipes("sources")]) or "none"
    raise ConfigError(
        f"No data recipe is named {name!r}, and there is no such file. Known: {known}. A file "
        f"of your own is named by its path, such as data: my.jsonl."
    )


class Trainer:
    """Runs a recipe.

    Args:
        recipe: What to run.
        folder: Where the recipe's relative paths begin.
        out: Where the run goes.
        quiet: Show nothing.
    """

    def __init__(self, recipe: Recipe, folder: Path, out: Path, *, quiet: bool = False) -> None:
        self.recipe, self.folder, self.out = recipe, folder, out
        self.engine = Engine(recipe.run)
        self.quiet = quiet or not self.engine.is_main
        self._caches = Caches()

    def say(self, text: str = "") -> None:
        """Print a line, on the first rank."""
        if not self.quiet:
            print(text, flush=True)

    def open_data(self, stage: StageConfig) -> Mixture:
        """Open the data of a stage."""
        return open_mixture(
            self.recipe.data_of(stage),
            folder=self.folder,
            seed=key_of(self.recipe.run.seed, stage.name),
            shuffle=stage.shuffle,
            origin=f"stages.{stage.name}.data",
            find=find_data,
        )

    def open_validation(self) -> Mixture | None:
        """Open the rows that are never learnt, if the recipe names some."""
        if self.recipe.validation is None:
            return None
        return open_mixture(
            self.recipe.named_data(self.recipe.validation.data),
            folder=self.folder,
            shuffle=False,
            origin="validation.data",
            find=find_data,
        )

    def run(self) -> RunResult:
        """Go through all stages that are not done yet, and save the model.

        Raises:
            TrainingError: if the folder holds another run, or the run cannot go on.
            KeyboardInterrupt: if it was stopped; the same command goes on.
        """
        claim_folder(self.out, self.recipe, is_main=self.engine.is_main)
        self.engine.wait()
        if (self.out / RESULT).is_file():
            self.say(f"{self.out} is finished already; --fresh begins anew.")
            return RunResult.read(self.out, self.out / RESULT)
        # Data are opened before the model is loaded: what is wrong with them shows at once.
        mixtures = [self.open_data(stage) for stage in self.recipe.stages]
        run = self.prepare(mixtures)
        try:
            with _stopped_gently(run, self.say):
                stages = self._stages(run, mixtures)
            return self._save(run, stages)
        finally:
            run.log.close()
            if run.growth is not None:
                run.growth.log.close()
            self._caches.close()
            for tracker in run.trackers:
                tracker.close()

    def prepare(self, mixtures: list[Mixture], *, writes: bool = True) -> Run:
        """Compose the model and choose how to compute; with `writes` false no file is made."""
        recipe, engine = self.recipe, self.engine
        validation = self.open_validation()
        precision = choose_precision(recipe.run, engine.device)
        assistant = self._compose(precision)
        if engine.sharding == "auto":
            self._settle(assistant.model, precision)
        assistant.model.to(engine.device)
        attention = choose_attention(assistant.model, recipe.run, engine.device)
        attention = with_sharing(assistant.model, attention)
        if recipe.run.compile:
            self._compile(assistant.model)
        if engine.in_step:
            # Each rank brings its own pieces to its device, when a stage begins.
            assistant.model.to("cpu")
        if engine.warning:
            self.say(engine.warning)
        many = f", {engine.world} processes, {engine.sharding}" if engine.world > 1 else ""
        self.say(f"computing   {precision.name} on {engine.device}{many}: {precision.reason}")
        rows = "packed" if attention.packed else "padded"
        self.say(f"attention   {attention.backend}, {rows}: {attention.reason}")
        writes = writes and engine.is_main
        trackers: list[Tracker] = []
        if writes:
            self.out.mkdir(parents=True, exist_ok=True)
            trackers = open_trackers(recipe.run.log_to, self.out, recipe.to_dict())
        run = Run(
            recipe=recipe,
            out=self.out,
            assistant=assistant,
            engine=engine,
            precision=precision,
            attention=attention,
            log=JsonLog(self.out / "log.jsonl" if writes else None),
            growth=None,
            trackers=trackers,
            quiet=self.quiet,
            validation=validation,
        )
        check_stages(assistant.model, recipe.stages)
        run.growth = self._growth(run, mixtures, writes=writes)
        return run

    def _compile(self, model: Any) -> None:
        """Compile each layer of each part, when it first runs.

        Raises:
            ConfigError: if the layers are spread over processes.
        """
        if self.engine.in_step:
            raise ConfigError(
                f"run.compile is true, and the layers are spread by run.sharding "
                f"{self.engine.sharding}, with which it is not proven. Set run.compile to false."
            )
        for layer in layers_of(model):
            layer.compile()

    def _settle(self, model: Any, precision: Precision) -> None:
        """Choose how the model is spread, for the stage that needs most memory."""
        engine, memory = self.engine, memory_here(self.engine.device)
        if engine.world == 1 or isinstance(model, WholeModel):
            engine.settle("ddp" if engine.world > 1 else "none")
            return
        if engine.device.type == "cpu":
            memory //= engine.world
        plans = [
            plan_memory(
                model,
                set() if stage.adapters else set(matching(model, stage.patterns)),
                precision=precision,
                row_tokens=packing_of(self.recipe, stage)[0].row_tokens,
                optimizer=stage.optimizer,
            )
            for stage in self.recipe.stages
        ]
        choice = choose_sharding(
            max(plans, key=lambda plan: plan.total), engine.world, memory,
            layer=max((bytes_of(layer) for layer in layers_of(model)), default=0),
            has_deepspeed=find_spec("deepspeed") is not None and precision.name in ("fp32", "bf16"),
        )  # fmt: skip
        engine.settle(choice.sharding, offload=choice.offload)
        self.say(f"sharding    {choice.sharding}: {choice.reason}")

    def _compose(self, precision: Precision) -> Assistant:
        """Build the model on the CPU; the same weights each time."""
        torch.manual_seed(self.recipe.run.seed)
        model_words = copy.deepcopy(self.recipe.model)
        if "from" in model_words:
            place = _folder_or_id(model_words.pop("from"), self.folder)
            whole = bool(model_words.pop("whole", False))
            if model_words:
                assistant = self._upgraded(place, model_words)
            else:
                assistant = load(place, device="cpu", whole=whole)
        else:
            assistant = compose(**model_words)
        assistant.model.cast(precision.dtype)
        recomputes = self.recipe.run.gradient_checkpointing
        if recomputes:
            assistant.model.gradient_checkpointing_enable({"use_reentrant": False})
        if not self.recipe.run.compile:  # a compiler finds by itself what need not be kept
            keep_less(assistant.model, recomputes=recomputes)
        return assistant

    def _upgraded(self, place: str | Path, parts: dict[str, Any]) -> Assistant:
        """Put other parts into a checkpoint, and say what is kept of it."""
        model, processor, kept = upgrade(place, parts)
        for line in kept:
            self.say(f"kept        {line}")
        return Assistant(model, processor)

    def _compose_anew(self, run: Run) -> None:
        """Put what has learnt into a new model: one that was spread cannot be used again."""
        stage = run.adapters_of
        run.assistant = self._compose(run.precision)
        set_attention(run.assistant.model, run.attention.backend)
        if run.growth is not None:
            run.growth.assistant = run.assistant
        weights, run.masters, run.adapters = run.masters, {}, None
        self._put_back(run, weights, stage)

    def _put_back(self, run: Run, weights: dict[str, torch.Tensor], stage: str | None) -> None:
        """Put weights into a new model; `stage` says which adapters stand beside them."""
        rest = _put_weights(run.assistant, weights)
        if stage is not None:
            run.change_adapters(next(s for s in self.recipe.stages if s.name == stage))
            rest = _put_weights(run.assistant, rest)
        if rest:
            raise TrainingError(
                f"The checkpoint holds {next(iter(rest))!r}, which this model has not: its "
                f"parts have changed. Begin anew with --fresh."
            )
        device = "cpu" if run.engine.in_step else run.engine.device
        run.masters = {name: value.to(device) for name, value in weights.items()}

    def _growth(self, run: Run, mixtures: list[Mixture], *, writes: bool) -> Growth | None:
        ask = self.recipe.ask
        if ask is None or not (self.engine.is_main or self.engine.in_step):
            return None
        mixture = mixtures[-1]
        if ask.data is not None:
            mixture = open_mixture(
                self.recipe.named_data(ask.data), folder=self.folder, origin="run.ask.data",
                find=find_data,
            )  # fmt: skip
        questions = choose_questions(mixture, ask.num)
        log = JsonLog(self.out / "growth.jsonl" if writes else None)
        return Growth(run.assistant, questions, ask, log)

    def _stages(self, run: Run, mixtures: list[Mixture]) -> list[StageResult]:
        checkpoints = self._checkpoints()
        if run.engine.is_main:
            for found in filter(None, checkpoints):
                delete_old(found.parent, keep=self.recipe.run.keep_checkpoints)
        latest = max((i for i, found in enumerate(checkpoints) if found), default=-1)
        checkpoint = load_checkpoint(checkpoints[latest]) if latest >= 0 else None  # type: ignore[arg-type]
        self._go_back_to(run, checkpoint)
        results: list[StageResult] = []
        for number, (stage, mixture) in enumerate(zip(self.recipe.stages, mixtures, strict=True)):
            if number < latest or (
                number == latest and checkpoint and checkpoint.state["finished"]
            ):
                path = checkpoints[number]
                if path is None:
                    raise TrainingError(
                        f"{self.out} has checkpoints of a later stage and none of {stage.name}. "
                        f"Bring {self.out / 'checkpoints' / stage.name} back, or begin anew with "
                        f"--fresh."
                    )
                results.append(_result_of(path))
                self.say(f"\nstage {stage.name} ({number + 1} of {len(mixtures)}) is done already")
                continue
            unfinished = checkpoint if number == latest else None
            results.append(self._stage(run, stage, number, mixture, unfinished))
            if run.stop:
                raise KeyboardInterrupt(
                    f"stopped in stage {stage.name} after step {results[-1].steps:,}; the same "
                    f"command goes on from there"
                )
        return results

    def _checkpoints(self) -> list[Path | None]:
        return [last_checkpoint(self.out / "checkpoints" / s.name) for s in self.recipe.stages]

    def _go_back_to(self, run: Run, checkpoint: Checkpoint | None) -> None:
        """Take over what has learnt so far, and cut the logs to the same moment."""
        state: dict[str, Any] = {"log_bytes": 0, "growth_bytes": 0, "quarantine": {"bytes": 0}}
        if checkpoint is not None:
            state = checkpoint.state
            self._put_back(run, checkpoint.weights, state["stage"])
        run.log.cut(state["log_bytes"])
        if run.growth is not None:
            run.growth.log.cut(state["growth_bytes"])
        drops = self.out / "quarantine.jsonl"
        if self.engine.is_main and drops.exists():
            with drops.open("r+b") as file:
                file.truncate(state["quarantine"]["bytes"])

    def _stage(
        self,
        run: Run,
        stage: StageConfig,
        number: int,
        mixture: Mixture,
        checkpoint: Checkpoint | None,
    ) -> StageResult:
        if run.was_spread:
            self._compose_anew(run)
        adapters = run.change_adapters(stage)
        cache = self._caches.of(run, stage)
        running = StageRun(run, stage, number, mixture, cache=cache, checkpoint=checkpoint)
        self.say(f"\nstage {running.title}")
        if adapters is not None:
            self.say(f"adapters    {adapters}")
        self.say(table(running.reports))
        counts = ", ".join(f"{name} {count:,}" for name, count in mixture.counts.items())
        self.say(f"data        {counts} rows an epoch")
        if cache is not None:
            lower = " (of the layers that stand still)" if isinstance(cache, TrunkCache) else ""
            self.say(f"features    {len(cache):,} pictures known in {cache.folder}{lower}")
        if checkpoint is not None:
            self.say(f"going on    after step {running.step:,}")
        result = running.go()
        if run.engine.in_step and not run.stop:
            run.was_spread = True
            path = last_checkpoint(self.out / "checkpoints" / stage.name)
            assert path is not None
            run.masters = load_checkpoint(path).weights
        return result

    def _save(self, run: Run, stages: list[StageResult]) -> RunResult:
        """Write model, delta and result; the result last, so that its presence means done."""
        result = RunResult(self.out, stages)
        if run.was_spread:
            self._compose_anew(run)
        if self.engine.is_main:
            set_attention(run.assistant.model, "sdpa")
            keep_all(run.assistant.model)
            if self.recipe.run.gradient_checkpointing:
                run.assistant.model.gradient_checkpointing_disable()
            values = self.recipe.to_dict()
            run.assistant.notes["training"] = result.facts()
            # The small folder keeps the adapters as they are; the whole one has them merged.
            routed = is_routed(run.assistant.model)
            if not routed:
                self._save_delta(run, result)
            if run.adapters is not None and not routed:
                merge_adapters(run.assistant.model)
            run.assistant.model.eval().requires_grad_(True)
            result.stock_reasons = run.assistant.save(result.model, delta=routed, recipe=values)
            if routed:
                result.stock_reasons = [CANNOT_MERGE, *result.stock_reasons]
            self.say(result.write_page())
            result.write(self.out / RESULT)
        self.engine.wait()
        for stage in stages:
            self.say(
                f"stage {stage.name}: {stage.steps:,} steps, {stage.tokens:,} tokens, "
                f"loss {stage.first_loss or 0:.3f} to {stage.last_loss or 0:.3f}, "
                f"{stage.dropped:,} samples dropped"
            )
        self.say(f"saved       {result.model}")
        return result

    def _save_delta(self, run: Run, result: RunResult) -> None:
        """Write what was learnt beside the names of the parts, where the parts have names."""
        if "from" in self.recipe.model:
            self.say("no delta    the model began as a whole folder, not as parts with names")
            return
        try:
            run.assistant.save(result.delta, delta=True, recipe=self.recipe.to_dict())
        except CheckpointError as error:
            self.say(f"no delta    {error}")


def _put_weights(assistant: Assistant, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Put weights and statistics into a model by stable name; return what found no place."""
    model = assistant.model
    holders = {stable_name(name): value for name, value in model.named_parameters()}
    holders |= {stable_name(name): value for name, value in model.named_buffers()}
    with torch.no_grad():
        for name, value in weights.items():
            if name in holders:
                holders[name].copy_(value)
    return {name: value for name, value in weights.items() if name not in holders}


def _result_of(path: Path) -> StageResult:
    return StageResult(**load_checkpoint(path).state["result"])


def _folder_or_id(name: str, folder: Path) -> str | Path:
    beside = folder / name
    return beside if beside.is_dir() else name


@contextmanager
def _stopped_gently(run: Run, say: Callable[[str], None]) -> Generator[None]:
    """Let Ctrl-C and SIGTERM end the step, save, and stop; a second Ctrl-C stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        del frame
        if run.stop:
            raise KeyboardInterrupt
        run.stop = True
        say(f"\n{signal.Signals(number).name}: saving after this step; once more stops at once")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
