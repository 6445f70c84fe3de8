"""The door of this room: `train` takes a recipe and gives a finished run.

Heavy imports happen inside, so that recipes can be read without torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlm.training.recipe import Recipe, read_recipe

if TYPE_CHECKING:
    from mmlm.training.result import RunResult


def train(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    out: str | Path | None = None,
    *,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    fresh: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
) -> RunResult:
    """Train a model, stage by stage, as a recipe says.

    Args:
        recipe: The name of a recipe, the path of a YAML file, plain values, or a recipe.
        out: Where checkpoints, logs and the model go; ``runs/NAME`` when left out. The same
            recipe again goes on there.
        overrides: Single lines to change: ``{"stages.align.peak_lr": 5e-4}``.
        fresh: Begin anew, whatever `out` holds.
        dry_run: Build everything, say what learns and what the model sees, and stop.
        quiet: Show nothing.

    Returns:
        Where everything is, and how the stages went.

    Raises:
        ConfigError: if the recipe says something impossible.
        DataError: if too many samples cannot be used.
        TrainingError: if the run cannot start or go on.
        KeyboardInterrupt: if it was stopped; the same call goes on.
    """
    parsed, folder, name = read_recipe(recipe, overrides)
    place = Path(out) if out is not None else Path("runs") / name
    from mmlm.training.folder import forget_run
    from mmlm.training.trainer import Trainer

    trainer = Trainer(parsed, folder, place, quiet=quiet)
    if dry_run:
        from mmlm.training.preflight import check
        from mmlm.training.result import RunResult

        check(trainer)
        return RunResult(place)
    if fresh:
        if trainer.engine.is_main:
            forget_run(place)
        trainer.engine.wait()
    return trainer.run()
