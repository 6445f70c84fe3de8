"""What a run of benchmarks gave, and its files.

runner, results ──► outcome ──► results.json, predictions.jsonl, details.json
                    you are here
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from mmlm.errors import EvaluationError
from mmlm.evaluation.results import Prediction, Score
from mmlm.reports import plain_table, scores_table
from mmlm.storage import write_atomic


@dataclass(frozen=True)
class Evaluation:
    """What a run of benchmarks gave."""

    out: Path
    scores: tuple[Score, ...]
    predictions: tuple[Prediction, ...]
    details: dict[str, Any]

    def __str__(self) -> str:
        """The table of scores."""
        return plain_table([score.to_dict() for score in self.scores])

    def __rich__(self) -> Table:
        """The table of scores, with colours where the terminal has them."""
        return scores_table([score.to_dict() for score in self.scores])

    def score(self, set_name: str, question: str, condition: str = "image") -> Score:
        """Return one score.

        Raises:
            EvaluationError: if it was not measured; names what was.
        """
        for score in self.scores:
            if (score.set, score.question, score.condition) == (set_name, question, condition):
                return score
        known = ", ".join(f"{s.set}/{s.question}/{s.condition}" for s in self.scores)
        raise EvaluationError(
            f"{set_name}/{question}/{condition} was not measured. Measured: {known}."
        )


def write(result: Evaluation) -> None:
    """Write the files of a run; `results.json` last."""
    lines = (json.dumps(p.to_dict(), ensure_ascii=False) for p in result.predictions)
    write_text(result.out / "predictions.jsonl", "".join(line + "\n" for line in lines))
    write_text(result.out / "details.json", json.dumps(result.details, indent=2) + "\n")
    # Last, so that a folder with results.json is a folder whose run is complete.
    scores = [score.to_dict() for score in result.scores]
    write_text(result.out / "results.json", json.dumps(scores, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        EvaluationError: if the disk does not take it.
    """
    try:
        write_atomic(path, text)
    except OSError as error:
        raise EvaluationError(
            f"{path} cannot be written: {error}. The answers are kept; make room and run the same "
            f"command again."
        ) from None
