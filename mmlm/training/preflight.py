"""`mmlm check` and `--dry-run`: what a recipe will do, before it does it.

The model is composed and the data are opened as for training; a few hundred samples are planned,
and one step is not taken. What would silently go wrong is an error here: a pattern that
matches nothing, samples of which nothing is learnt, packed samples that see each other.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlm.data.mixture import Mixture
from mmlm.data.preview import Survey, as_terminal, complaint, survey, told
from mmlm.data.preview_page import preview_page
from mmlm.errors import DataError
from mmlm.hub import opens_in
from mmlm.training.learning import freeze, matching, table
from mmlm.training.memory import memory_here, plan_memory
from mmlm.training.objectives import planner_of
from mmlm.training.recipe import StageConfig
from mmlm.training.shared import Run, packing_of
from mmlm.training.validation import plan_rows
from mmlm.whole import WholeModel

if TYPE_CHECKING:
    from mmlm.training.trainer import Trainer

_NUM_SURVEYED = 300
_NUM_SHOWN = 2


def check(trainer: Trainer, html: Path | None = None) -> None:
    """Build everything, say what would happen, and stop before the first step.

    Args:
        trainer: What would train.
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
    for number, (stage, mixture) in enumerate(zip(recipe.stages, mixtures, strict=True)):
        trainer.say(f"\nstage {stage.name} ({number + 1} of {len(mixtures)})")
        page = html if html is None or number == 0 else _beside(html, stage.name)
        _check_stage(trainer, run, stage, mixture, page)
    _say_opens_in(trainer, run)
    run.log.close()
    if run.growth is not None:
        run.growth.log.close()


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


def _check_stage(
    trainer: Trainer, run: Run, stage: StageConfig, mixture: Mixture, html: Path | None
) -> None:
    model: Any = run.assistant.model
    adapters = run.change_adapters(stage)
    if adapters is not None:
        trainer.say(f"adapters    {adapters}")
    trainer.say(table(freeze(model, stage.patterns)))
    packing, rows_per_step = packing_of(trainer.recipe, stage)
    planner = planner_of(stage.objective)(
        mixture, run.assistant.processor, max_tokens=packing.row_tokens,
        max_tiles=packing.max_tiles, max_patches=packing.max_patches,
        share=run.attention.shares,
    )  # fmt: skip
    found = survey(planner, range(min(_NUM_SURVEYED, mixture.epoch_rows)))
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
    chosen = set(matching(model, stage.patterns))
    memory = plan_memory(model, chosen, precision=run.precision, row_tokens=packing.row_tokens)
    trainer.say(
        f"memory      {memory.line()}, of {memory_here(run.engine.device) / 2**30:.1f} GiB here; "
        f"an estimate"
    )
    for sample in found.samples[:_NUM_SHOWN]:
        trainer.say()
        trainer.say(as_terminal(sample, run.assistant.processor, colour=sys.stdout.isatty()))


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
    tokens = found.num_tokens
    until = stage.until
    rows = until.samples or (until.epochs and round(until.epochs * mixture.epoch_rows))
    if rows:
        planned = rows * tokens / num
        trainer.say(
            f"length      {rows:,} samples, about {planned:,.0f} tokens in "
            f"{max(1, round(planned / stage.step_tokens)):,} steps"
        )


def _say_opens_in(trainer: Trainer, run: Run) -> None:
    """Say which tools open the result."""
    if isinstance(run.assistant.model, WholeModel):
        trainer.say("\nopens in    whatever opened the model before: the class stays the same")
        return
    trainer.say("\nopens in")
    for row in opens_in(run.assistant.model.config):
        trainer.say(f"  {row.tool:18} {row.verdict:8} {row.reason}")
