"""The files of a run, as reports read them; what is missing is empty.

log.jsonl           training: one line a step, with stage, step, loss, useful_tokens_per_second;
                    and a line for each validation, with validation_loss
growth.jsonl        the same pictures asked again and again; `Round`
results.json        scores; predictions.jsonl: every question with answer and truth
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmlm.errors import DataError
from mmlm.reports.svg import Curve

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Answered:
    """One picture of one round of questions during training."""

    image: str | None
    question: str
    answer: str
    truth: str = ""


@dataclass(frozen=True)
class Round:
    """All pictures, asked at one moment of the training."""

    stage: str
    step: int
    answers: tuple[Answered, ...]


@dataclass(frozen=True)
class RunFiles:
    """Everything that a report shows of a run."""

    results: Rows = field(default_factory=list)
    predictions: Rows = field(default_factory=list)
    log: Rows = field(default_factory=list)
    rounds: tuple[Round, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)


def read_run(run: Path | None, scores: Path | None) -> RunFiles:
    """Read the files of a training run and of an evaluation; either may be None.

    Raises:
        DataError: if a file is there and cannot be read.
    """
    log = read_lines(run / "log.jsonl") if run else []
    growth = read_lines(run / "growth.jsonl") if run else []
    if scores is None:
        return RunFiles(log=log, rounds=rounds(growth))
    results_file, details_file = scores / "results.json", scores / "details.json"
    results = json.loads(results_file.read_text("utf-8")) if results_file.is_file() else []
    details = json.loads(details_file.read_text("utf-8")) if details_file.is_file() else {}
    predictions = read_lines(scores / "predictions.jsonl")
    return RunFiles(results, predictions, log, rounds(growth), details)


def read_lines(path: Path) -> Rows:
    """Read a JSONL file; a last line that was cut short is left out, any other is an error.

    Raises:
        DataError: naming the line.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    rows: Rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number == len(lines):
                break
            raise DataError(f"{path} line {number} is not JSON. Was the file edited?") from None
    return rows


def rounds(rows: Rows) -> tuple[Round, ...]:
    """Put the lines of `growth.jsonl` into rounds.

    A line is one round, ``{stage, step, answers: [{image, question, answer, truth}]}``, or
    one answer, ``{stage, step, image, question, answer}``.
    """
    found: dict[tuple[str, int], list[Answered]] = {}
    for row in rows:
        moment = (str(row.get("stage", "")), int(row.get("step", 0)))
        for each in row.get("answers", [row]):
            found.setdefault(moment, []).append(
                Answered(
                    each.get("image"),
                    str(each.get("question", "")),
                    str(each.get("answer", "")),
                    str(each.get("truth") or ""),
                )
            )
    return tuple(Round(stage, step, tuple(each)) for (stage, step), each in found.items())


def stage_curves(log: Rows, key: str) -> list[Curve]:
    """Return one curve for each stage of the log, of a number that its lines hold."""
    stages: dict[str, list[tuple[float, float]]] = {}
    for number, row in enumerate(log):
        value = row.get(key)
        if isinstance(value, int | float):
            step = float(row.get("step", number))
            stages.setdefault(str(row.get("stage", "")), []).append((step, float(value)))
    return [Curve(name, points) for name, points in stages.items()]
