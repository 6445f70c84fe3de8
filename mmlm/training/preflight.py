"""`mmlm check` and `--dry-run`: what a recipe will do, before it does it.

The model is composed and the data are opened as for training; a few hundred samples are planned,
and one step is not taken. What would silently go wrong is an error here: a pattern that
matches nothing, samples of which nothing is learnt, packed samples that see each other.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmlm.data.mixture import Mixture
from mmlm.data.preview import Survey, as_terminal, complaint, survey, told
from mmlm.data.preview_page import preview_page
from mmlm.errors import DataError
from mmlm.hub import opens_in
from mmlm.language.routing import CANNOT_MERGE
from mmlm.training.batches import TILES_AT_ONCE
from mmlm.training.foresight.estimate import REACHED, Estimate, Work, assumptions, estimate
from mmlm.training.foresight.flops import costs_of
from mmlm.training.foresight.machines import Hardware
from mmlm.training.foresight.rehearsal import RowShape
from mmlm.training.learning import freeze, matching, table
from mmlm.training.memory import MemoryPlan, memory_here, plan_memory
from mmlm.training.objectives import planner_of
from mmlm.training.precision import Precision
from mmlm.training.recipe import StageConfig
from mmlm.training.sharding import bytes_of, layers_of
from mmlm.training.shared import Run, packing_of
from mmlm.training.validation import plan_rows
from mmlm.whole import WholeModel

if TYPE_CHECKING:
    from mmlm.training.trainer import Trainer

_NUM_SURVEYED = 300
_NUM_SHOWN = 2


@dataclass(frozen=True)
class Elsewhere:
    """A machine for which the cost is to be foreseen.

    Args:
        hardware: So many devices of a kind.
        reached: The share of its rate that the computing is assumed to reach.
    """

    hardware: Hardware
    reached: float = REACHED


def check(
    trainer: Trainer, html: Path | None = None, *, elsewhere: Elsewhere | None = None
) -> None:
    """Build everything, say what would happen, and stop before the first step.

    Args:
        trainer: What would train.
        elsewhere: A machine for which time and cost are foreseen as well.
        html: Where to write a page with the samples of each stage; ``FILE-STAGE.html`` for later
            stages.

    Raises:
        DataError: if nothing would be learnt from a stage's data.
        ConfigError: if the recipe says something impossible.
    """
    recipe = trainer.recipe
    mixtures = [trainer.open_data(stage) for stage in recipe.stages]
    for stage in recipe.stages:
        packing_of(recipe, stage)
    run = trainer.prepare(mixtures, writes=False)
    _say_shapes(trainer, run)
    _say_validation(trainer, run)
    costs: list[Estimate | None] = []
    for number, (stage, mixture) in enumerate(zip(recipe.stages, mixtures, strict=True)):
        trainer.say(f"\nstage {stage.name} ({number + 1} of {len(mixtures)})")
        page = html if html is None or number == 0 else _beside(html, stage.name)
        costs.append(_check_stage(trainer, run, stage, mixture, page, elsewhere))
    if elsewhere is not None:
        _say_costs(trainer, elsewhere, costs)
    _say_opens_in(trainer, run)
    run.log.close()
    if run.growth is not None:
        run.growth.log.close()


def plans_of(trainer: Trainer) -> list[MemoryPlan]:
    """Return what each stage takes, as `check` says it; nothing is written."""
    mixtures = [trainer.open_data(stage) for stage in trainer.recipe.stages]
    run = trainer.prepare(mixtures, writes=False)
    found: list[MemoryPlan] = []
    for stage, mixture in zip(trainer.recipe.stages, mixtures, strict=True):
        run.change_adapters(stage)
        freeze(run.assistant.model, stage.patterns)
        found.append(plan_stage(run, stage, _survey(run, stage, mixture)))
    run.log.close()
    return found


def _survey(run: Run, stage: StageConfig, mixture: Mixture) -> Survey:
    """Look at some samples of a stage, without opening a picture."""
    packing, _ = packing_of(run.recipe, stage)
    planner = planner_of(stage.objective)(
        mixture, run.assistant.processor, max_tokens=packing.row_tokens,
        max_tiles=packing.max_tiles, max_patches=packing.max_patches,
        share=run.attention.shares,
    )  # fmt: skip
    return survey(planner, range(min(_NUM_SURVEYED, mixture.epoch_rows)))


def plan_stage(
    run: Run,
    stage: StageConfig,
    found: Survey,
    precision: Precision | None = None,
    world: int | None = None,
) -> MemoryPlan:
    """Count what a stage takes, with rows as full as the survey says.

    Args:
        run: What the stages share; the model is frozen as the stage has it.
        stage: The stage.
        found: Samples of its data.
        precision: Another number format than that of the run.
        world: Another number of devices.
    """
    packing, rows = packing_of(run.recipe, stage)
    model: Any = run.assistant.model
    tokens = max(found.num_tokens, 1)
    tiles = sum(sample.num_tiles for sample in found.samples)
    frozen = not any(p.requires_grad for p in model.model.vision.parameters())
    row = RowShape(
        tokens=packing.row_tokens,
        labels=-(-packing.row_tokens * found.num_labels // tokens),
        tiles=min(-(-packing.row_tokens * tiles // tokens), packing.max_tiles),
        encoded_at_once=TILES_AT_ONCE if frozen and run.recipe.run.feature_cache != "off" else 0,
    )
    return plan_memory(
        model, set(matching(model, stage.patterns)), precision=precision or run.precision,
        row_tokens=packing.row_tokens, row=None if isinstance(model, WholeModel) else row,
        rows=-(-rows // (world or run.engine.world)), optimizer=stage.optimizer,
    )  # fmt: skip


def _say_shapes(trainer: Trainer, run: Run) -> None:
    """Say what a picture becomes on its way to the language model."""
    model: Any = run.assistant.model
    if isinstance(model, WholeModel):
        names = f"{type(model.stock).__name__}, {type(model.processor.stock).__name__}"
        trainer.say(f"picture     as its own processor prepares it ({names})")
        return
    config = model.config
    counter, facts = config.counter(), config.facts
    plan = counter.plan(counter.side)
    grid, reached = facts.out_grid(counter.side), counter.grid_of_tile(counter.side)
    trainer.say(
        f"picture     {counter.side.height}×{counter.side.width} px, {len(plan.tiles)} tile"
        f"{'' if len(plan.tiles) == 1 else 's'} ► {grid.rows}×{grid.columns} features of width "
        f"{facts.width} ► {reached.num_tokens} tokens of width {config.text_config.hidden_size}"
    )


def _say_validation(trainer: Trainer, run: Run) -> None:
    """Plan the rows that are never learnt, as every stage would."""
    config = trainer.recipe.validation
    if config is None or run.validation is None:
        return
    for stage in trainer.recipe.stages:
        rows, left_out = plan_rows(
            run.validation, run.assistant.processor, packing_of(trainer.recipe, stage)[0],
            most=config.samples, budget=trainer.recipe.run.drop_budget,
            planner=planner_of(stage.objective),
        )  # fmt: skip
        num = sum(len(row.samples) for row in rows)
        trainer.say(
            f"validation  {num:,} rows in stage {stage.name}, {left_out.dropped:,} left out; every "
            f"{config.every_steps:,} steps"
        )


def _beside(html: Path, stage: str) -> Path:
    return html.with_name(f"{html.stem}-{stage}{html.suffix}")


def _say_costs(trainer: Trainer, elsewhere: Elsewhere, costs: list[Estimate | None]) -> None:
    hours = sum(one.hours or 0.0 for one in costs if one is not None)
    cost = sum(one.cost or 0.0 for one in costs if one is not None)
    trainer.say(f"\nin all      {hours:.3g} h on {elsewhere.hardware.text}, about ${cost:,.2f}")
    trainer.say(assumptions(elsewhere.hardware, elsewhere.reached))


def _foresee(
    run: Run, stage: StageConfig, mixture: Mixture, found: Survey, elsewhere: Elsewhere
) -> Estimate | None:
    """Return what a stage costs on another machine; None for a stock class taken whole."""
    model: Any = run.assistant.model
    if isinstance(model, WholeModel):
        return None
    _, rows = packing_of(run.recipe, stage)
    precision = run.precision
    if run.recipe.run.precision == "auto":
        precision = replace(precision, name="bf16", dtype=torch.bfloat16, autocast=False)
    frozen = not any(p.requires_grad for p in model.model.vision.parameters())
    tiles = sum(sample.num_tiles for sample in found.samples)
    again = stage.until.epochs or 1.0
    if frozen and run.recipe.run.feature_cache != "off" and again > 1:
        tiles = round(tiles / again)
    tokens = max(found.num_tokens, 1)
    flops = costs_of(model).of(found.samples, encoded=tiles) * stage.step_tokens / tokens
    named = list(model.named_parameters())
    work = Work(
        plan=plan_stage(run, stage, found, precision, world=elsewhere.hardware.count),
        layer=max((bytes_of(layer) for layer in layers_of(model)), default=0),
        weights=sum(p.numel() for _, p in named),
        learnt=sum(p.numel() for _, p in named if p.requires_grad),
        flops=flops,
        tokens=planned_tokens(stage, mixture, found),
        step_tokens=stage.step_tokens,
        rows=rows,
        recomputes=run.recipe.run.gradient_checkpointing,
    )
    return estimate(work, elsewhere.hardware, reached=elsewhere.reached)


def planned_tokens(stage: StageConfig, mixture: Mixture, found: Survey) -> float | None:
    """Return how many tokens a stage learns from, if that is known."""
    until = stage.until
    if until.tokens is not None:
        return until.tokens
    if until.steps is not None:
        return until.steps * stage.step_tokens
    rows = until.samples or (until.epochs and round(until.epochs * mixture.epoch_rows))
    num = len(found.samples) + len(found.drops)
    return rows * found.num_tokens / num if rows and num else None


def _check_stage(
    trainer: Trainer,
    run: Run,
    stage: StageConfig,
    mixture: Mixture,
    html: Path | None,
    elsewhere: Elsewhere | None,
) -> Estimate | None:
    model: Any = run.assistant.model
    adapters = run.change_adapters(stage)
    if adapters is not None:
        trainer.say(f"adapters    {adapters}")
    trainer.say(table(freeze(model, stage.patterns)))
    packing, rows_per_step = packing_of(trainer.recipe, stage)
    found = _survey(run, stage, mixture)
    if html is not None:
        title = f"Stage {stage.name}: what the model sees"
        page = preview_page(found, run.assistant.processor, title=title)
        html.write_text(page, encoding="utf-8")
        trainer.say(f"page        {html}")
    _say_survey(trainer, run, stage, mixture, found)
    trainer.say(
        f"step        {rows_per_step} row{'s' if rows_per_step > 1 else ''} of "
        f"{packing.row_tokens:,} tokens, {'packed' if run.attention.packed else 'padded'}"
    )
    memory = plan_stage(run, stage, found)
    trainer.say(
        f"memory      {memory.line()}, of {memory_here(run.engine.device) / 2**30:.1f} GiB here; "
        f"{memory.how}"
    )
    cost = None if elsewhere is None else _foresee(run, stage, mixture, found, elsewhere)
    if cost is not None and elsewhere is not None:
        for line in cost.lines(elsewhere.hardware):
            trainer.say(line)
    for sample in found.samples[:_NUM_SHOWN]:
        trainer.say()
        trainer.say(as_terminal(sample, run.assistant.processor, colour=sys.stdout.isatty()))
    return cost


def _say_survey(
    trainer: Trainer, run: Run, stage: StageConfig, mixture: Mixture, found: Survey
) -> None:
    num = len(found.samples) + len(found.drops)
    counts = ", ".join(f"{name} {count:,}" for name, count in mixture.counts.items())
    trainer.say(f"data        {counts} rows an epoch; {num:,} looked at")
    for line in told(found, run.assistant.processor):
        trainer.say(line)
    if (wrong := complaint(found, budget=trainer.recipe.run.drop_budget)) is not None:
        raise DataError(f"Stage {stage.name}: {wrong}")
    planned = planned_tokens(stage, mixture, found)
    if planned is not None:
        until = stage.until
        rows = until.samples or (until.epochs and round(until.epochs * mixture.epoch_rows))
        trainer.say(
            f"length      {f'{rows:,} samples, ' if rows else ''}about {planned:,.0f} tokens in "
            f"{max(1, round(planned / stage.step_tokens)):,} steps"
        )


def _say_opens_in(trainer: Trainer, run: Run) -> None:
    """Say which tools open the result."""
    if isinstance(run.assistant.model, WholeModel):
        trainer.say("\nopens in    whatever opened the model before: the class stays the same")
        return
    last = trainer.recipe.stages[-1].adapter_config()
    if last is not None and len(last.ranks) > 1:
        trainer.say(f"\nopens in    MMLM alone, with the base parts in reach. {CANNOT_MERGE}")
        return
    trainer.say("\nopens in")
    for row in opens_in(run.assistant.model.config):
        trainer.say(f"  {row.tool:18} {row.verdict:8} {row.reason}")
