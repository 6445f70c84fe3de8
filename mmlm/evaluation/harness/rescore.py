"""Our answers under lmms-eval's own functions, beside our marks of them.

    python -m mmlm.evaluation.harness.rescore runs/x/eval/predictions.jsonl pope [--data DIR]

Each row of the benchmark is handed to the function that lmms-eval's task names, with our answer,
and the score that it makes of them stands beside the mean of our marks. Where the two differ,
`mmlm eval --dialects` shows which answers make the difference.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

from mmlm.errors import EvaluationError, MissingExtraError
from mmlm.evaluation.benchmarks.benchmark import Benchmark, load_benchmark
from mmlm.evaluation.reports.comparison import predictions_from
from mmlm.evaluation.reports.dialects import read_answers_of


class Theirs(NamedTuple):
    """Where lmms-eval marks a benchmark.

    Args:
        module: The module under ``lmms_eval.tasks``.
        function: Its function of a row and a list of answers.
        metric: The metric that it gives, whose `score`, or itself, is the mark.
        aggregate: Its function from the metrics of all rows to the score; their mean if empty.
    """

    module: str
    function: str
    metric: str
    aggregate: str = ""


TASKS = {
    "vqav2": Theirs("vqav2.utils", "vqav2_process_results_val", "exact_match"),
    "textvqa": Theirs("textvqa.utils", "textvqa_process_results", "exact_match"),
    "vizwiz": Theirs("vizwiz_vqa.utils", "vizwiz_vqa_process_results", "exact_match"),
    "okvqa": Theirs("ok_vqa.utils", "ok_vqa_process_results", "exact_match"),
    "pope": Theirs("pope.utils", "pope_process_results", "pope_accuracy"),
    "chartqa": Theirs("chartqa.utils", "chartqa_process_results", "relaxed_overall"),
    "ocrbench": Theirs("ocrbench.utils", "ocrbench_process_results", "ocrbench_accuracy"),
    "scienceqa": Theirs("scienceqa.utils", "sqa_process_results", "exact_match"),
    "seedbench": Theirs(
        "seedbench.utils", "seed_process_result", "seed_all", "seed_aggregation_result"
    ),
    "mmstar": Theirs("mmstar.utils", "mmstar_process_results", "average"),
    "realworldqa": Theirs("realworldqa.utils", "realworldqa_process_results", "exact_match"),
    "vstar": Theirs("vstar_bench.utils", "vstar_process_results", "vstar_overall_acc"),
    "blink": Theirs("blink.utils", "blink_process_results", "blink_acc", "blink_aggregate_results"),
    "muirbench": Theirs(
        "muirbench.utils", "muir_process_results", "muirbench_score_overall", "muir_aggregation"
    ),
}
"""The benchmarks whose rows lmms-eval marks one by one without a judge."""


class Rescored(NamedTuple):
    """The two means, over the same answers."""

    n: int
    ours: float
    scorer: str
    theirs: float
    function: str


def rescore(benchmark: Benchmark, answers: Mapping[str, str]) -> Rescored:
    """Mark answers with lmms-eval's function.

    Args:
        benchmark: One of `TASKS`.
        answers: The answers, by the item's id.

    Raises:
        EvaluationError: if lmms-eval does not mark this benchmark one by one.
        MissingExtraError: if lmms-eval is not installed.
    """
    task = TASKS.get(benchmark.name)
    if task is None:
        raise EvaluationError(
            f"lmms-eval marks no single rows of {benchmark.name!r}. Known: {', '.join(TASKS)}."
        )
    mark = _function(task, task.function)
    predictions = predictions_from(benchmark, answers)
    if not predictions:
        raise EvaluationError(f"None of the answers belongs to {benchmark.name}.")
    # Their functions change the row that they are given.
    found = [
        mark(copy.deepcopy(dict(each.case.item.columns)), [each.answer])[task.metric]
        for each in predictions
    ]
    if task.aggregate:
        with redirect_stdout(StringIO()):  # some print tables of their own
            theirs = float(_function(task, task.aggregate)(found))
    else:
        marks = [float(each["score"] if isinstance(each, dict) else each) for each in found]
        theirs = sum(marks) / len(marks)
    ours = [each.mark.score for each in predictions]
    label = ", ".join(sorted({each.scorer for each in predictions}))
    return Rescored(len(ours), sum(ours) / len(ours), label, theirs, task.function)


def _function(task: Theirs, name: str) -> Callable[..., Any]:
    try:
        module: Any = import_module(f"lmms_eval.tasks.{task.module}")
    except ImportError as error:
        raise MissingExtraError(
            error.name or "lmms_eval", needed_for="rescoring with lmms-eval", extra="harness"
        ) from None
    return getattr(module, name)


def main(words: Sequence[str] | None = None) -> None:
    """Print both means."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("predictions", type=Path)
    parser.add_argument("benchmark")
    parser.add_argument("--data", type=Path, help="a local copy of the benchmark's rows")
    options = parser.parse_args(words)
    benchmark = load_benchmark(options.benchmark, data=options.data)
    found = rescore(benchmark, read_answers_of(options.predictions, benchmark.name))
    print(f"{found.n:,} answers to {benchmark.name}")
    print(f"  ours    {100 * found.ours:6.2f}  {found.scorer}")
    print(f"  theirs  {100 * found.theirs:6.2f}  lmms-eval {found.function}")


if __name__ == "__main__":
    main()
