"""Scores for a model folder: a section of its card, and the Hub's files of evaluation results.

    results.json ──► card ──► README.md (`## Scores`), .eval_results/*.yaml
                     you are here

The Hub shows entries of `.eval_results/*.yaml` on the model's page and on the leaderboard of
the benchmark's data set. An entry needs that data set's id, so only benchmarks with a
`hub_id` get one; the score with the image is the one that counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from mmlm.errors import EvaluationError
from mmlm.evaluation.benchmarks.benchmark import Benchmark
from mmlm.hub.card import CARD, write_eval_results
from mmlm.reports import markdown_table
from mmlm.storage import write_atomic

_SECTION = re.compile(r"^## Scores\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)


def card_section(scores: Sequence[Mapping[str, Any]]) -> str:
    """Return the section of a model card: the table, and how to read it."""
    rows = [dict(score) for score in scores]
    return (
        f"## Scores\n\n{markdown_table(rows)}\n\n"
        "In percent, with 95 % intervals (questions about one image count as one draw). *Blind* is "
        "the same question without the image, *shuffled image* with the image of another item: "
        "what the model does not gain over them, it does not see.\n"
    )


def write_scores(
    folder: Path,
    scores: Sequence[Mapping[str, Any]],
    benchmarks: Sequence[Benchmark],
    *,
    on: date | None = None,
) -> Path:
    """Write scores into a model folder: the section of its card, and the Hub's entries.

    Args:
        folder: The model folder; its card keeps everything but the scores.
        scores: Entries of `results.json`.
        benchmarks: The benchmarks that were measured.
        on: The day of the measurement; today when left out.

    Returns:
        The card.

    Raises:
        EvaluationError: if there is no such folder.
    """
    if not (folder / "config.json").is_file():
        raise EvaluationError(f"{folder} is no model folder: it has no config.json.")
    card = folder / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    section = card_section(scores)
    if _SECTION.search(text):
        text = _SECTION.sub(lambda _: section + "\n", text, count=1)
    else:
        text = f"{text.rstrip()}\n\n{section}".lstrip()
    write_atomic(card, text.rstrip() + "\n")
    write_eval_results(folder, hub_rows(scores, benchmarks, on=on))
    return card


def hub_rows(
    scores: Sequence[Mapping[str, Any]],
    benchmarks: Sequence[Benchmark],
    *,
    on: date | None = None,
) -> list[dict[str, Any]]:
    """Return the scores that have a place on the Hub, with what its entries say."""
    known = {each.name: each for each in benchmarks if each.config.hub_id is not None}
    return [
        {
            **score,
            "dataset_id": known[score["set"]].config.hub_id,
            "task_id": score["question"],
            "dataset_revision": known[score["set"]].revision or None,
            "date": (on or date.today()).isoformat(),
            "value": _value(score),
            "notes": _notes(score, scores),
        }
        for score in scores
        if score["set"] in known and score["condition"] == "image"
    ]


def _value(score: Mapping[str, Any]) -> float:
    is_points = str(score["metric"]).endswith("points")
    return round(score["score"] if is_points else 100 * score["score"], 2)


def _notes(score: Mapping[str, Any], scores: Sequence[Mapping[str, Any]]) -> str:
    others = [
        f"{other['condition']} {_value(other):g}"
        for other in scores
        if (other["set"], other["question"]) == (score["set"], score["question"])
        and other["condition"] in ("blind", "shuffled")
    ]
    factor = 1 if str(score["metric"]).endswith("points") else 100
    interval = f"{factor * score['low']:.1f} to {factor * score['high']:.1f}"
    return (
        f"{score['metric']} ({score['scorer']}), n = {score['n']}, 95 % interval {interval}"
        + "".join(f", {other}" for other in others)
    )
