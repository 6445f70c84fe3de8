"""Two checkpoints on the same benchmarks: what changed, and whether the items can show it.

    outcome (before), outcome (after) ──► comparison ──► terminal, comparison.json, reports
                                          you are here

The test is paired and its unit is the picture; the metric is the benchmark's own. Beside each
difference stands the power line: the smallest one that these items show four times out of five.
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
from mmlm.evaluation.benchmarks.conditions import cases
from mmlm.evaluation.outcome import Evaluation, write_text
from mmlm.evaluation.results import Prediction, compare, predict_all
from mmlm.evaluation.statistics import Interval, visible_by_interval
from mmlm.reports.files import read_lines

_CHANGED_SHOWN = 12
_SQRT2 = 2**0.5
_SURE = 0.05


@dataclass(frozen=True)
class Change:
    """One kind of question of one set, before and after.

    Args:
        set: The benchmark.
        question: The kind of question.
        metric: What the scores are.
        n: Items that both answered.
        before: The score of the one.
        after: The score of the other.
        difference: After minus before, in the unit of the score.
        low: The lower end of its 95 % interval.
        high: The upper end.
        gain: The difference where more is better, else its negative.
        p_value: How likely chance alone makes a difference as large.
        visible: The smallest difference that these items show, 4 times out of 5.
        num_won: Items that are marked better after.
        num_lost: Items that are marked worse.
    """

    set: str
    question: str
    metric: str
    n: int
    before: float
    after: float
    difference: float
    low: float
    high: float
    gain: float
    p_value: float
    visible: float
    num_won: int
    num_lost: int

    @property
    def verdict(self) -> str:
        """``better``, ``worse``, or that the two cannot be told apart.

        Interval and test must agree: on a few pictures the one is bolder than the other.
        """
        if self.low <= 0 <= self.high or self.p_value >= _SURE:
            return "cannot be told apart"
        return "better" if self.gain > 0 else "worse"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, the verdict included."""
        return {**asdict(self), "verdict": self.verdict}


@dataclass(frozen=True)
class Comparison:
    """All changes, and items whose mark changed."""

    before: str
    after: str
    changes: tuple[Change, ...]
    changed: tuple[dict[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as `comparison.json` and the report hold them."""
        return {
            "before": self.before,
            "after": self.after,
            "changes": [change.to_dict() for change in self.changes],
            "changed": list(self.changed),
        }

    def table(self) -> Table:
        """Return the changes as a table for the terminal."""
        table = Table(title=f"{self.before} → {self.after}", title_justify="left")
        for name in ("set", "question"):
            table.add_column(name)
        for name in ("n", "before", "after", "difference", "p", "visible from", "won", "lost"):
            table.add_column(name, justify="right")
        table.add_column("verdict")
        for each in self.changes:
            unit = 1 if each.metric.endswith("points") else 100
            low, high = unit * each.low, unit * each.high
            table.add_row(
                each.set, each.question, f"{each.n:,}", f"{unit * each.before:.1f}",
                f"{unit * each.after:.1f}",
                f"{unit * each.difference:+.1f} ({low:+.1f} to {high:+.1f})",
                f"{each.p_value:.2g}", f"{unit * each.visible:.1f}", f"{each.num_won:,}",
                f"{each.num_lost:,}", each.verdict,
            )  # fmt: skip
        table.caption = (
            "Differences in points with 95 % intervals; questions about one picture count as one. "
            "A difference below 'visible from' cannot be seen with so many items."
        )
        return table


def compare_evaluations(
    benchmarks: Sequence[Benchmark],
    before: Evaluation,
    after: Evaluation,
    *,
    names: tuple[str, str] = ("before", "after"),
    seed: int = 0,
) -> Comparison:
    """Compare two evaluations of the same benchmarks, on the items that both answered.

    Raises:
        EvaluationError: if they share no item.
    """
    changes: list[Change] = []
    changed: list[dict[str, Any]] = []
    for benchmark in benchmarks:
        for kind in benchmark.kinds:
            pair = [_of(each, benchmark.name, kind) for each in (before, after)]
            shared = set(pair[0]) & set(pair[1])
            first = [prediction for name, prediction in pair[0].items() if name in shared]
            second = [pair[1][prediction.case.item.id] for prediction in first]
            if first:
                changes.append(_change(benchmark, kind, first, second, seed=seed))
                changed += _examples(first, second)
    if not changes:
        raise EvaluationError(
            "The two evaluations share no item that both answered with the image. Evaluate both "
            "on the same benchmarks, with the same limit and seed."
        )
    return Comparison(*names, tuple(changes), tuple(changed))


def predictions_from(
    benchmark: Benchmark, answers: Mapping[str, str], *, seed: int = 0
) -> list[Prediction]:
    """Mark answers that stand in a file, such as those of an earlier evaluation.

    Args:
        benchmark: The benchmark.
        answers: The answer to each item with its picture, by the item's id.
        seed: Seed of the conditions.
    """
    found: list[Prediction] = []
    for kind in benchmark.kinds:
        items = [item for item in benchmark.items if item.kind == kind and item.id in answers]
        asked = cases(benchmark, "image", items, seed=seed)
        texts = [answers[case.item.id] for case in asked]
        found += predict_all(benchmark.scorers[kind], asked, texts)
    return found


def read_evaluation(benchmarks: Sequence[Benchmark], folder: Path) -> Evaluation:
    """Read the answers of an earlier evaluation, and mark them by today's rules.

    Raises:
        EvaluationError: if the folder holds answers to none of the benchmarks.
    """
    rows = read_lines(folder / "predictions.jsonl")
    found: list[Prediction] = []
    for benchmark in benchmarks:
        answers = {
            str(row["id"]): str(row["answer"])
            for row in rows
            if row.get("set") == benchmark.name and row.get("condition") == "image"
        }
        found += predictions_from(benchmark, answers)
    if not found:
        raise EvaluationError(
            f"{folder} holds no answers to {', '.join(each.name for each in benchmarks)}."
        )
    return Evaluation(folder, (), tuple(found), {})


def write_comparison(comparison: Comparison, folder: Path) -> Path:
    """Write `comparison.json`, and put it into `details.json`, which the report shows."""
    path, details = folder / "comparison.json", folder / "details.json"
    write_text(path, json.dumps(comparison.to_dict(), indent=2, ensure_ascii=False) + "\n")
    if details.is_file():
        values = json.loads(details.read_text(encoding="utf-8"))
        values["comparison"] = comparison.to_dict()
        write_text(details, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    return path


def _of(evaluation: Evaluation, name: str, kind: str) -> dict[str, Prediction]:
    return {
        each.case.item.id: each
        for each in evaluation.predictions
        if (each.case.benchmark, each.case.item.kind, each.case.condition) == (name, kind, "image")
    }


def _change(
    benchmark: Benchmark,
    kind: str,
    first: Sequence[Prediction],
    second: Sequence[Prediction],
    *,
    seed: int,
) -> Change:
    scorer = benchmark.scorers[kind]
    found = compare(scorer, second, first, seed=seed)
    marks = [(a.mark.score, b.mark.score) for a, b in zip(first, second, strict=True)]
    # What the interval of this paired difference is wide is what these items can show.
    width = Interval(0.0, found["low"], found["high"])
    return Change(
        set=benchmark.name, question=kind, metric=scorer.metric, n=found["n"],
        before=found["score"] - found["difference"], after=found["score"],
        difference=found["difference"], low=found["low"], high=found["high"],
        gain=found["gain"], p_value=found["p_value"],
        visible=visible_by_interval(width) / _SQRT2,
        num_won=sum(b > a for a, b in marks), num_lost=sum(b < a for a, b in marks),
    )  # fmt: skip


def _examples(first: Sequence[Prediction], second: Sequence[Prediction]) -> list[dict[str, Any]]:
    """Return some items whose mark changed, the lost ones first."""
    moved = [(a, b) for a, b in zip(first, second, strict=True) if a.mark.score != b.mark.score]
    moved.sort(key=lambda pair: (pair[1].mark.score > pair[0].mark.score, pair[0].case.item.id))
    lost = [pair for pair in moved if pair[1].mark.score < pair[0].mark.score]
    won = [pair for pair in moved if pair[1].mark.score > pair[0].mark.score]
    return [_example(a, b) for a, b in (*lost[:_CHANGED_SHOWN], *won[:_CHANGED_SHOWN])]


def _example(before: Prediction, after: Prediction) -> dict[str, Any]:
    row = after.to_dict()
    return {
        **{key: row[key] for key in ("set", "question", "id", "images", "image_keys", "prompt")},
        "references": row["references"][:3],
        "before": before.answer,
        "after": after.answer,
        "won": after.mark.score > before.mark.score,
    }
