"""One file of predictions under every dialect of its scorer: where a mismatch comes from.

    predictions.jsonl ──► dialects ──► a table, and for each difference the answers that make it
                          you are here

Two people report different numbers for one checkpoint most often because their scripts read the
same answers differently. Nothing is answered again here: the answers of a run are marked once
for each dialect.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from mmlm.errors import EvaluationError
from mmlm.evaluation.benchmarks.benchmark import Benchmark
from mmlm.evaluation.benchmarks.conditions import Case, cases
from mmlm.evaluation.results import Prediction, interval_of, predict_all, row_of
from mmlm.evaluation.scorers import ScorerConfig
from mmlm.reports.files import read_lines
from mmlm.reports.tables import percent, score_text

_EXAMPLES = 3


@dataclass(frozen=True)
class DialectScore:
    """The score of one dialect, and what it makes of the answers."""

    set: str
    question: str
    dialect: str
    used: bool
    """Whether the benchmark's file asks for this one."""
    score: float
    low: float
    high: float
    metric: str
    parse_fail_rate: float
    num_other_marks: int
    """Answers that get another mark than under the dialect in use."""


@dataclass(frozen=True)
class Mismatch:
    """Answers that two dialects mark differently, and why."""

    set: str
    question: str
    dialect: str
    used: str
    change: str
    """Such as ``wrong → right``."""
    num_answers: int
    effect: float
    """What they add to the mean mark."""
    examples: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Dialects:
    """All dialects of all kinds of question of a benchmark."""

    scores: tuple[DialectScore, ...]
    mismatches: tuple[Mismatch, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "scores": [asdict(score) for score in self.scores],
            "mismatches": [asdict(mismatch) for mismatch in self.mismatches],
        }

    def table(self) -> Table:
        """Return the scores side by side."""
        table = Table(title="One set of answers, read by several scripts", title_justify="left")
        for name in ("set", "question", "dialect"):
            table.add_column(name)
        for name in ("score", "unreadable", "marked otherwise"):
            table.add_column(name, justify="right")
        for each in self.scores:
            table.add_row(
                each.set,
                each.question,
                f"{each.dialect} *" if each.used else each.dialect,
                score_text(asdict(each)),
                percent(each.parse_fail_rate),
                f"{each.num_other_marks:,}",
            )
        table.caption = "* the one that the benchmark's file asks for"
        return table

    def why(self) -> Table:
        """Return what the differences are made of."""
        table = Table(title="Where they differ", title_justify="left")
        table.add_column("question")
        table.add_column("against")
        table.add_column("change")
        table.add_column("answers", justify="right")
        table.add_column("points", justify="right")
        table.add_column("such as (read here / read there; truth)")
        for each in self.mismatches:
            shown = "\n".join(_shown(example) for example in each.examples)
            table.add_row(
                each.question, f"{each.used} → {each.dialect}", each.change,
                f"{each.num_answers:,}", f"{100 * each.effect:+.1f}", shown,
            )  # fmt: skip
        return table


def in_all_dialects(benchmark: Benchmark, answers: Mapping[str, str], *, seed: int = 0) -> Dialects:
    """Mark answers under every dialect of each scorer of a benchmark.

    Args:
        benchmark: The benchmark.
        answers: The answer to each item that was asked with its picture, by its id.
        seed: Seed of the intervals.

    Raises:
        EvaluationError: if not one answer belongs to an item of the benchmark.
    """
    scores: list[DialectScore] = []
    mismatches: list[Mismatch] = []
    for kind in benchmark.kinds:
        items = [item for item in benchmark.items if item.kind == kind and item.id in answers]
        if not items:
            continue
        found, scorer = cases(benchmark, "image", items, seed=seed), benchmark.scorers[kind]
        texts = [answers[case.item.id] for case in found]
        marked = {name: _marked(scorer, name, found, texts) for name in _others_last(scorer)}
        used = marked[scorer.spoken]
        for name, predictions in marked.items():
            scores.append(_score(benchmark.name, kind, scorer, name, predictions, used, seed=seed))
            if name != scorer.spoken:
                mismatches += _mismatches(benchmark.name, kind, name, scorer, used, predictions)
    if not scores:
        raise EvaluationError(
            f"Not one of the {len(answers)} answers belongs to an item of {benchmark.name}, by id. "
            f"Is it the benchmark that they were given to?"
        )
    return Dialects(tuple(scores), tuple(mismatches))


def read_answers_of(path: Path, benchmark: str) -> dict[str, str]:
    """Return the answers of a `predictions.jsonl` with the picture, by the item's id.

    Raises:
        EvaluationError: if the file holds none of this benchmark.
    """
    rows = read_lines(path)
    found = {
        str(row["id"]): str(row["answer"])
        for row in rows
        if row.get("set") == benchmark and row.get("condition") == "image"
    }
    if not found:
        sets = sorted({str(row.get("set")) for row in rows})
        raise EvaluationError(
            f"{path} holds no answers to {benchmark!r} with the image; it holds "
            f"{', '.join(sets) or 'nothing'}."
        )
    return found


def _others_last(scorer: ScorerConfig) -> list[str]:
    return [scorer.spoken, *(name for name in scorer.dialects if name != scorer.spoken)]


def _marked(
    scorer: ScorerConfig, dialect: str, found: Sequence[Case], texts: Sequence[str]
) -> list[Prediction]:
    speaking = scorer.model_copy(update={"dialect": dialect})
    speaking.ready()
    return predict_all(speaking, found, texts)


def _score(
    name: str,
    kind: str,
    scorer: ScorerConfig,
    dialect: str,
    predictions: Sequence[Prediction],
    used: Sequence[Prediction],
    *,
    seed: int,
) -> DialectScore:
    speaking = scorer.model_copy(update={"dialect": dialect})
    clusters = [prediction.case.item.cluster for prediction in predictions]
    rows = [row_of(prediction) for prediction in predictions]
    interval = interval_of(speaking, rows, clusters, seed=seed)
    unreadable = sum(prediction.mark.reading is None for prediction in predictions)
    return DialectScore(
        set=name, question=kind, dialect=dialect, used=dialect == scorer.spoken,
        **interval._asdict(), metric=scorer.metric,
        parse_fail_rate=unreadable / len(predictions),
        num_other_marks=sum(
            a.mark.score != b.mark.score for a, b in zip(predictions, used, strict=True)
        ),
    )  # fmt: skip


def _mismatches(
    name: str,
    kind: str,
    dialect: str,
    scorer: ScorerConfig,
    used: Sequence[Prediction],
    others: Sequence[Prediction],
) -> list[Mismatch]:
    """Group the answers that two dialects mark differently by how the mark changes."""
    groups: dict[str, list[tuple[Prediction, Prediction]]] = {}
    for here, there in zip(used, others, strict=True):
        if here.mark.score != there.mark.score:
            change = f"{_word(here.mark.score)} → {_word(there.mark.score)}"
            groups.setdefault(change, []).append((here, there))
    return [
        Mismatch(
            set=name, question=kind, dialect=dialect, used=scorer.spoken, change=change,
            num_answers=len(pairs),
            effect=sum(there.mark.score - here.mark.score for here, there in pairs) / len(used),
            examples=tuple(_example(here, there) for here, there in _different(pairs)),
        )
        for change, pairs in sorted(groups.items(), key=lambda group: -len(group[1]))
    ]  # fmt: skip


def _different(
    pairs: Sequence[tuple[Prediction, Prediction]],
) -> list[tuple[Prediction, Prediction]]:
    """Return a few pairs with different answers."""
    by_answer = {here.answer: (here, there) for here, there in reversed(pairs)}
    return list(by_answer.values())[-_EXAMPLES:][::-1]


def _example(here: Prediction, there: Prediction) -> dict[str, Any]:
    return {
        "id": here.case.item.id,
        "answer": here.answer,
        "read_here": here.mark.reading,
        "read_there": there.mark.reading,
        "truth": list(here.case.item.target.references[:3]),
    }


def _shown(example: Mapping[str, Any]) -> str:
    answer = json.dumps(str(example["answer"])[:60], ensure_ascii=False)
    readings = " / ".join(
        "nothing" if example[key] is None else str(example[key])[:30]
        for key in ("read_here", "read_there")
    )
    truth = ", ".join(dict.fromkeys(example["truth"]))[:40]
    return f"{answer} ({readings}; {truth})"


def _word(score: float) -> str:
    return "right" if score >= 1 else "wrong" if score <= 0 else f"{score:.2g}"
