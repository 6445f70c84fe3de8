"""From answers to numbers: marks, scores with intervals, and what the picture carried.

`results.json` is a list with one entry for each set, kind of question and condition:

    set, question   what was measured
    condition       image, blind, shuffled, permuted, or nearest_neighbour (no language model:
                    the encoder's own features, see `probe`)
    n               items
    score, low, high  the score and its 95 % interval, shares between 0 and 1 (MME: points)
    metric, scorer  what the score is, and whose rules gave it
    chance          what guessing gives, where there are choices; else null
    parse_fail_rate share of answers in which the scorer could read nothing (they are wrong)
    empty_rate      share of answers without a single character
    num_images      pictures, the units of the interval
    lower_is_better whether a smaller score is the better one

`details.json` holds the rest: scores by group, differences between conditions, further metrics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmlm.errors import EvaluationError
from mmlm.evaluation.benchmarks.benchmark import Benchmark
from mmlm.evaluation.benchmarks.conditions import Case
from mmlm.evaluation.scorers import Mark, Row, ScorerConfig, Target
from mmlm.evaluation.scorers.choice import truth_number
from mmlm.evaluation.statistics import (
    Interval,
    bootstrap,
    paired_metric_test,
    paired_test,
    share_interval,
    smallest_visible_difference,
    visible_by_interval,
)

MOST_CHARACTERS = 200_000
"""The longest answer that is marked; a longer one is refused, wherever it comes from."""


@dataclass(frozen=True)
class Score:
    """One line of `results.json`; the module says what the fields mean."""

    set: str
    question: str
    condition: str
    n: int
    score: float
    low: float
    high: float
    metric: str
    scorer: str
    chance: float | None
    parse_fail_rate: float
    empty_rate: float
    num_images: int
    lower_is_better: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Prediction:
    """One answer and its mark."""

    case: Case
    answer: str
    mark: Mark
    scorer: str

    def to_dict(self) -> dict[str, Any]:
        """Return one line of `predictions.jsonl`."""
        case, item = self.case, self.case.item
        paths = [str(image.resolve()) for image in case.images if isinstance(image, Path)]
        return {
            "set": case.benchmark,
            "question": item.kind,
            "condition": case.condition,
            "id": item.id,
            "images": paths,
            "image_keys": list(case.image_keys),
            "shown_from": case.shown_from or None,
            "prompt": case.prompt,
            "choices": list(case.choices),
            "answer": self.answer,
            "references": list(item.target.references),
            "reading": self.mark.reading,
            "score": self.mark.score,
            "scorer": self.scorer,
            "thing": item.thing or None,
            "groups": dict(item.groups),
        }


def predict(scorer: ScorerConfig, case: Case, answer: str) -> Prediction:
    """Mark an answer; the choices stand as they were shown."""
    target = case.item.target
    if case.choices != target.choices:
        target = _permuted(case)
    return Prediction(case, answer, scorer.mark(answer, target), scorer.label)


def predict_all(
    scorer: ScorerConfig, cases: Sequence[Case], answers: Sequence[str]
) -> list[Prediction]:
    """Mark the answers of one pass, together where a scorer asks for all of them.

    Raises:
        EvaluationError: if an answer is too long to be read.
    """
    check_lengths(cases, answers)
    marked = [predict(scorer, case, text) for case, text in zip(cases, answers, strict=True)]
    settled = scorer.settle(answers, [row_of(each) for each in marked])
    return [replace(each, mark=mark) for each, mark in zip(marked, settled, strict=True)]


def check_lengths(cases: Sequence[Case], answers: Sequence[str]) -> None:
    """Refuse an answer that no scorer should read; cutting it would score something else.

    Raises:
        EvaluationError: naming the item.
    """
    for case, answer in zip(cases, answers, strict=False):
        if len(answer) > MOST_CHARACTERS:
            raise EvaluationError(
                f"The answer to {case.benchmark}, item {case.item.id}, has {len(answer):,} "
                f"characters; at most {MOST_CHARACTERS:,} are scored. Lower "
                f"generate.max_new_tokens, or look at what answers."
            )


def _permuted(case: Case) -> Target:
    """Return the target with the choices as they were shown; a letter is turned into its text."""
    target = case.item.target
    number = truth_number(target)
    references = target.references if number is None else (target.choices[number],)
    return replace(target, choices=case.choices, references=references)


def summarise(
    benchmark: Benchmark, kind: str, condition: str, predictions: Sequence[Prediction], *, seed: int
) -> Score:
    """Turn the answers of one pass into a score with its interval."""
    scorer = benchmark.scorers[kind]
    rows = [row_of(prediction) for prediction in predictions]
    clusters = [prediction.case.item.cluster for prediction in predictions]
    interval = interval_of(scorer, rows, clusters, seed=seed)
    guesses = [scorer.chance(row.target) for row in rows]
    known = [guess for guess in guesses if guess is not None]
    return Score(
        set=benchmark.name,
        question=kind,
        condition=condition,
        n=len(rows),
        score=interval.score,
        low=interval.low,
        high=interval.high,
        metric=scorer.metric,
        scorer=scorer.label,
        chance=float(np.mean(known)) if len(known) == len(rows) else None,
        parse_fail_rate=float(np.mean([row.mark.reading is None for row in rows])),
        empty_rate=float(np.mean([not prediction.answer.strip() for prediction in predictions])),
        num_images=len(set(clusters)),
        lower_is_better=scorer.lower_is_better,
    )


def interval_of(
    scorer: ScorerConfig, rows: Sequence[Row], clusters: Sequence[str], *, seed: int
) -> Interval:
    """Return the metric of a scorer with its interval; the unit is the picture."""
    if scorer.is_share:
        return share_interval([row.mark.score for row in rows], clusters, seed=seed)
    return bootstrap(sums_by_picture(scorer, rows, clusters), scorer.value, seed=seed)


def sums_by_picture(
    scorer: ScorerConfig, rows: Sequence[Row], clusters: Sequence[str]
) -> NDArray[np.float64]:
    """Return the tallies of each picture: ``(pictures, k)``, in order of first appearance."""
    tallies = scorer.tallies(rows)
    numbers: dict[str, int] = {}
    index = [numbers.setdefault(name, len(numbers)) for name in clusters]
    sums = np.zeros((len(numbers), tallies.shape[1]))
    np.add.at(sums, index, tallies)
    return sums


def details(
    benchmark: Benchmark, kind: str, passes: dict[str, list[Prediction]], *, seed: int
) -> dict[str, Any]:
    """Return what stands behind the scores of one kind of question.

    Args:
        benchmark: The benchmark.
        kind: The kind of question.
        passes: The predictions of each condition.
        seed: Seed of the intervals.
    """
    scorer = benchmark.scorers[kind]
    found: dict[str, Any] = {"set": benchmark.name, "question": kind, "scorer": scorer.label}
    with_image = passes.get("image", [])
    if with_image:
        found["also"] = scorer.also([row_of(prediction) for prediction in with_image])
        found["groups"] = _groups(scorer, with_image, seed=seed)
        found["metric"], found["lower_is_better"] = scorer.metric, scorer.lower_is_better
        found["smallest_visible_difference"] = smallest_visible(scorer, with_image, seed=seed)
    found["against"] = {
        condition: compare(scorer, with_image, predictions, seed=seed)
        for condition, predictions in passes.items()
        if condition != "image" and with_image and predictions
    }
    return found


def smallest_visible(
    scorer: ScorerConfig, predictions: Sequence[Prediction], *, seed: int
) -> float:
    """Return the difference below which this many items show nothing, in the unit of the score."""
    rows = [row_of(prediction) for prediction in predictions]
    if scorer.is_share:
        return smallest_visible_difference(
            len(rows), float(np.mean([row.mark.score for row in rows]))
        )
    clusters = [prediction.case.item.cluster for prediction in predictions]
    return visible_by_interval(interval_of(scorer, rows, clusters, seed=seed))


def compare(
    scorer: ScorerConfig, first: Sequence[Prediction], second: Sequence[Prediction], *, seed: int
) -> dict[str, Any]:
    """Compare two passes on the items that both hold, by the benchmark's own metric.

    The unit is the picture. `gain` is the difference where more is better, else its negative.
    """
    other = {prediction.case.item.id: prediction for prediction in second}
    ours = [prediction for prediction in first if prediction.case.item.id in other]
    if not ours:
        return {"n": 0}
    theirs = [other[prediction.case.item.id] for prediction in ours]
    clusters = [prediction.case.item.cluster for prediction in ours]
    rows = [[row_of(prediction) for prediction in side] for side in (ours, theirs)]
    if scorer.is_share:
        marks = [[row.mark.score for row in side] for side in rows]
        result = paired_test(marks[0], marks[1], clusters, seed=seed)
        score = float(np.mean(marks[0]))
    else:
        sums = [sums_by_picture(scorer, side, clusters) for side in rows]
        result = paired_metric_test(sums[0], sums[1], scorer.value, seed=seed)
        score = float(scorer.value(sums[0].sum(axis=0)))
    carried = None if score == 0 or scorer.lower_is_better else result.difference / score
    gain = -result.difference if scorer.lower_is_better else result.difference
    return {
        "n": len(ours), "score": score, **result._asdict(), "gain": gain,
        "share_of_score": carried,
    }  # fmt: skip


def _groups(
    scorer: ScorerConfig, predictions: Sequence[Prediction], *, seed: int
) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for column in predictions[0].case.item.groups:
        values = sorted({prediction.case.item.groups[column] for prediction in predictions})
        for value in values:
            members = [p for p in predictions if p.case.item.groups[column] == value]
            interval = interval_of(
                scorer,
                [row_of(prediction) for prediction in members],
                [prediction.case.item.cluster for prediction in members],
                seed=seed,
            )
            also = scorer.also([row_of(prediction) for prediction in members])
            found.append(
                {"by": column, "group": value, "n": len(members), **interval._asdict()}
                | ({"also": also} if also else {})
            )
    return found


def row_of(prediction: Prediction) -> Row:
    """Return a prediction as a metric sees it."""
    item = prediction.case.item
    group = next(iter(item.groups.values()), "")
    return Row(item.id, item.cluster, group, prediction.mark, item.target)
