"""What all stages of a run share: model, processes, precision, logs, and what has learnt so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from mmlm.assistant import Assistant
from mmlm.data import PackingConfig
from mmlm.data.mixture import Mixture
from mmlm.data.order import key_of
from mmlm.errors import ConfigError
from mmlm.language.adapters import AdapterConfig
from mmlm.training.adapting import change_adapters
from mmlm.training.attention import AttentionChoice
from mmlm.training.callbacks import Growth
from mmlm.training.display import JsonLog, Tracker
from mmlm.training.parallel import Engine
from mmlm.training.precision import Precision
from mmlm.training.recipe import Recipe, StageConfig

_MOST_ROW_TOKENS = 4096


@dataclass
class Run:
    """What all stages of a run share.

    Args:
        recipe: The whole recipe.
        out: The folder of the run.
        assistant: The model and its processor.
        engine: The processes.
        precision: The number format.
        attention: The attention backend, and whether rows are packed.
        log: One line a step.
        growth: Answers on the same few pictures, or None.
        trackers: Where numbers go beside the log.
        masters: What has learnt so far, by stable name, in float32 but for merged weights.
        adapters: What stands beside the weights now, or None.
        validation: The rows that are never learnt, or None.
        adapters_of: The stage whose adapters these are, or None.
        was_spread: Whether the model has been spread over ranks, and cannot be used again.
        quiet: Show nothing.
        stop: Set when the run is to stop after the step.
    """

    recipe: Recipe
    out: Path
    assistant: Assistant
    engine: Engine
    precision: Precision
    attention: AttentionChoice
    log: JsonLog
    growth: Growth | None
    trackers: list[Tracker]
    masters: dict[str, Tensor] = field(default_factory=dict)
    adapters: AdapterConfig | None = None
    validation: Mixture | None = None
    adapters_of: str | None = None
    was_spread: bool = False
    quiet: bool = False
    stop: bool = False

    @property
    def quarantine_path(self) -> Path | None:
        """Where drops are written; by the first rank alone."""
        return self.out / "quarantine.jsonl" if self.engine.is_main else None

    def change_adapters(self, stage: StageConfig) -> str | None:
        """Put the adapters of a stage beside the weights; say what was done, if anything was."""
        after = stage.adapter_config()
        seed = key_of(self.recipe.run.seed, stage.name, "adapters")
        done = change_adapters(
            self.assistant.model, self.masters, before=self.adapters, after=after, seed=seed
        )
        self.adapters, self.adapters_of = after, stage.name
        return done


def packing_of(
    recipe: Recipe, stage: StageConfig, *, packed: bool = True
) -> tuple[PackingConfig, int]:
    """Return how rows are filled, and the number of rows of a step.

    Where samples do not share rows, those of like length stand under one another.

    Raises:
        ConfigError: if a row is asked to be longer than a step.
    """
    run = recipe.run
    if run.row_tokens is not None and run.row_tokens > stage.step_tokens:
        raise ConfigError(
            f"run.row_tokens ({run.row_tokens:,}) is more than stages.{stage.name}.step_tokens "
            f"({stage.step_tokens:,}): one row would be more than a step. Lower row_tokens, or "
            f"raise step_tokens."
        )
    row_tokens = run.row_tokens or min(_MOST_ROW_TOKENS, stage.step_tokens)
    packing = PackingConfig(
        row_tokens=row_tokens, pool_samples=run.pool_samples, max_tiles=run.row_tiles,
        max_patches=run.row_patches,
        alike=not packed,
    )  # fmt: skip
    return packing, max(1, round(stage.step_tokens / row_tokens))
