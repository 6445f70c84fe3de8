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

`details.json` holds the rest: scores by group, differences between conditions, further metrics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmlm.evaluation.benchmark import Benchmark
from mmlm.evaluation.conditions import Case
from mmlm.evaluation.scorers import Mark, Row, ScorerConfig, Target
from mmlm.evaluation.scorers.choice import truth_number
from mmlm.evaluation.statistics import (
    Interval,
    bootstrap,
    paired_test,
    share_interval,
    smallest_visible_difference,
)


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
    """Mark the answers of one pass, together where a scorer asks for all of them."""
    marked = [predict(scorer, case, text) for case, text in zip(cases, answers, strict=True)]
    settled = scorer.settle(answers, [_row(each) for each in marked])
    return [replace(each, mark=mark) for each, mark in zip(marked, settled, strict=True)]


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
    rows = [_row(prediction) for prediction in predictions]
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
    )


def interval_of(
    scorer: ScorerConfig, rows: Sequence[Row], clusters: Sequence[str], *, seed: int
) -> Interval:
    """Return the metric of a scorer with its interval; the unit is the picture."""
    if scorer.is_share:
        return share_interval([row.mark.score for row in rows], clusters, seed=seed)
    tallies = scorer.tallies(rows)
    numbers: dict[str, int] = {}
    index = [numbers.setdefault(name, len(numbers)) for name in clusters]
    sums = np.zeros((len(numbers), tallies.shape[1]))
    np.add.at(sums, index, tallies)
    return bootstrap(sums, scorer.value, seed=seed)


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
        found["also"] = scorer.also([_row(prediction) for prediction in with_image])
        found["groups"] = _groups(scorer, with_image, seed=seed)
        share = float(np.mean([prediction.mark.score for prediction in with_image]))
        found["smallest_visible_difference"] = (
            smallest_visible_difference(len(with_image), share) if scorer.is_share else None
        )
    found["against"] = {
        condition: compare(with_image, predictions, seed=seed)
        for condition, predictions in passes.items()
        if condition != "image" and with_image and predictions
    }
    return found


def compare(
    first: Sequence[Prediction], second: Sequence[Prediction], *, seed: int
) -> dict[str, Any]:
    """Compare two passes on the items that both hold, picture by picture."""
    other = {prediction.case.item.id: prediction.mark.score for prediction in second}
    shared = [prediction for prediction in first if prediction.case.item.id in other]
    if not shared:
        return {"n": 0}
    ours = [prediction.mark.score for prediction in shared]
    theirs = [other[prediction.case.item.id] for prediction in shared]
    result = paired_test(ours, theirs, [p.case.item.cluster for p in shared], seed=seed)
    mean = float(np.mean(ours))
    return {
        "n": len(shared),
        **result._asdict(),
        "share_of_score": None if mean == 0 else result.difference / mean,
    }


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
                [_row(prediction) for prediction in members],
                [prediction.case.item.cluster for prediction in members],
                seed=seed,
            )
            found.append({"by": column, "group": value, "n": len(members), **interval._asdict()})
    return found


def _row(prediction: Prediction) -> Row:
    item = prediction.case.item
    group = next(iter(item.groups.values()), "")
    return Row(item.id, item.cluster, group, prediction.mark, item.target)
