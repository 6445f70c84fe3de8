"""Scores for a model card: a Markdown table, and the Hub's files of evaluation results.

The Hub shows entries of `.eval_results/*.yaml` on the model's page and on the leaderboard of
the benchmark's data set. An entry needs that data set's id, so only benchmarks with a
`hub_id` get one; the score with the image is the one that counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from mmlm.errors import EvaluationError
from mmlm.evaluation.benchmarks.benchmark import Benchmark
from mmlm.reports import markdown_table


def read_scores(folder: Path) -> list[dict[str, Any]]:
    """Read `results.json` of an evaluation.

    Raises:
        EvaluationError: if the evaluation was not finished.
    """
    path = folder / "results.json"
    if not path.is_file():
        raise EvaluationError(
            f"{folder} has no results.json: the evaluation was not finished. The same `mmlm eval` "
            f"command goes on where it stopped."
        )
    return json.loads(path.read_text(encoding="utf-8"))


def card_section(scores: Sequence[Mapping[str, Any]]) -> str:
    """Return the section of a model card: the table, and how to read it."""
    rows = [dict(score) for score in scores]
    return (
        f"## Evaluation\n\n{markdown_table(rows)}\n\n"
        "In percent, with 95 % intervals (questions about one image count as one draw). *Blind* is "
        "the same question without the image, *shuffled image* with the image of another item: "
        "what the model does not gain over them, it does not see.\n"
    )


def eval_results(
    scores: Sequence[Mapping[str, Any]],
    benchmarks: Sequence[Benchmark],
    *,
    on: date | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Return the Hub's entries, by file name.

    Args:
        scores: Entries of `results.json`.
        benchmarks: The benchmarks that were measured.
        on: The day of the measurement; today when left out.
    """
    day = (on or date.today()).isoformat()
    files: dict[str, list[dict[str, Any]]] = {}
    for benchmark in benchmarks:
        if benchmark.config.hub_id is None:
            continue
        entries = [
            EvalResultEntry(
                dataset_id=benchmark.config.hub_id,
                task_id=score["question"],
                value=_value(score),
                dataset_revision=benchmark.config.dataset.revision,
                date=day,
                notes=_notes(score, scores),
            )
            for score in scores
            if score["set"] == benchmark.name and score["condition"] == "image"
        ]
        if entries:
            files[f"{benchmark.name}.yaml"] = eval_result_entries_to_yaml(entries)
    return files


def write_eval_results(
    folder: Path, files: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[Path]:
    """Write the Hub's entries into the `.eval_results` of a model folder."""
    target = folder / ".eval_results"
    written: list[Path] = []
    for name, entries in files.items():
        target.mkdir(parents=True, exist_ok=True)
        path = target / name
        path.write_text(
            yaml.safe_dump([dict(entry) for entry in entries], sort_keys=False, allow_unicode=True),
            encoding="utf-8",
        )
        written.append(path)
    return written


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
