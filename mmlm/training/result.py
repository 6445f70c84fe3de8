"""What a training leaves behind, for whoever started it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmlm.assistant import Assistant, load
from mmlm.errors import MMLMError
from mmlm.reports import write_report
from mmlm.training.display import duration


@dataclass(frozen=True)
class StageResult:
    """How one stage went.

    Args:
        name: The stage.
        steps: Optimiser steps.
        samples: Samples looked at, dropped ones included.
        dropped: Samples left out.
        tokens: Tokens learnt from, image tokens included.
        seconds: Time spent, over all starts of the run.
        first_loss: Mean of the first five steps.
        last_loss: Mean of the last five steps.
        learning: Weights that learnt.
        validation_loss: The lowest loss on rows that are never learnt, if there are any.
        best_step: The step at which it was so low.
        seen: MFU and what it is measured against, peak memory, room, padding, loss by source.
    """

    name: str
    steps: int
    samples: int
    dropped: int
    tokens: int
    seconds: float
    first_loss: float | None
    last_loss: float | None
    learning: int
    validation_loss: float | None = None
    best_step: int | None = None
    seen: dict[str, Any] = field(default_factory=dict)


@dataclass
class RunResult:
    """A finished run.

    Args:
        out: The folder of the run.
        stages: How each stage went.
        stock_reasons: Why the model is no stock class of transformers; empty if it is one.
    """

    out: Path
    stages: list[StageResult] = field(default_factory=list)
    stock_reasons: list[str] = field(default_factory=list)

    @property
    def model(self) -> Path:
        """The folder of the trained model."""
        return self.out / "model"

    @property
    def delta(self) -> Path:
        """The small folder that holds only what was learnt."""
        return self.out / "delta"

    @property
    def assistant(self) -> Assistant:
        """The trained model, read from its folder."""
        return load(self.model)

    def facts(self) -> list[dict[str, object]]:
        """Return how the stages went as plain values, for the model card."""
        return [asdict(stage) for stage in self.stages]

    def write_page(self) -> str:
        """Write `report.html`, and say where; a page that cannot be written costs no model."""
        facts = {
            "stages": ", ".join(stage.name for stage in self.stages),
            "tokens": f"{sum(stage.tokens for stage in self.stages):,}",
            "time": duration(sum(stage.seconds for stage in self.stages)),
        }
        facts |= {
            f"MFU of {stage.name}": f"{100 * stage.seen['mfu']:.0f} %"
            for stage in self.stages
            if "mfu" in stage.seen
        }
        try:
            written = write_report(self.out, run=self.out, facts=facts)
        except (MMLMError, OSError) as error:
            return f"no report   {error}"
        return f"report      {written.page}"

    def write(self, path: Path) -> None:
        """Write the result as JSON."""
        values = {
            "stages": self.facts(),
            "stock_reasons": self.stock_reasons,
        }
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, out: Path, path: Path) -> RunResult:
        """Read what `write` wrote."""
        values = json.loads(path.read_text(encoding="utf-8"))
        stages = [StageResult(**stage) for stage in values["stages"]]
        return cls(out, stages, values["stock_reasons"])
