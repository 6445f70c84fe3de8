"""Runs benchmarks: every item in every condition, each answer on disk as soon as it is there.

    plan ──► asking ──► answers.jsonl ──► results ──► outcome, reports
             runner puts them together

A run that was killed goes on with the same command: answers are found again by what they
depend on (see `answers`). The files of a run:

    answers.jsonl       the log: one line for each answer, in the order of answering
    predictions.jsonl   one line for each item and condition: question, answer, truth, mark
    results.json        the scores; `results` says what the fields mean
    details.json        groups, differences between conditions, further metrics, what was run
    report.html         the same for people, with pictures; contact_sheet.png likewise

Started by `accelerate launch` or `torchrun`, each process answers its share; the first one
gathers the answers and writes the files (see `processes`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from mmlm.errors import EvaluationError
from mmlm.evaluation.asking.ask import ask, mark_all
from mmlm.evaluation.asking.backend import Backend, backend_for
from mmlm.evaluation.asking.processes import Processes
from mmlm.evaluation.benchmarks.benchmark import Benchmark
from mmlm.evaluation.benchmarks.conditions import Case, Condition
from mmlm.evaluation.benchmarks.plan import Draw, Pass, check_conditions, load_all, make_plan
from mmlm.evaluation.benchmarks.schema import BenchmarkConfig
from mmlm.evaluation.outcome import Evaluation as Evaluation
from mmlm.evaluation.outcome import write
from mmlm.evaluation.reports.report import facts_of, report
from mmlm.evaluation.results import Prediction, Score, details, summarise

DEFAULT_CONDITIONS: tuple[Condition, ...] = ("image", "blind", "shuffled")

Extra = Callable[[Benchmark, Sequence[Case], Backend], list[Score]]
"""Adds scores of its own to a run, such as a baseline (see `probe`)."""


def evaluate(
    model: Any,
    benchmarks: str | Path | BenchmarkConfig | Benchmark | Sequence[Any],
    out: str | Path | None = None,
    *,
    conditions: Sequence[Condition] = DEFAULT_CONDITIONS,
    limit: int | None = None,
    look_limit: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    fresh: bool = False,
    quiet: bool = False,
    run: str | Path | None = None,
    with_report: bool = True,
    extra: Iterable[Extra] = (),
) -> Evaluation:
    """Measure a model on benchmarks, and whether it looks at the picture.

    Args:
        model: A folder or Hub id, an `Assistant`, or anything with `answer_all` and `fingerprint`.
        benchmarks: Names, YAML files, configs or loaded benchmarks; one or several.
        out: The folder of the run, by default `eval` in that of the model. The same call again
            goes on where a killed run was.
        conditions: In which conditions each item is asked.
        limit: Draw this many items of each kind of question; all when left out.
        look_limit: Draw this many for all conditions but `image`; as many when left out.
        seed: Seed of what is drawn, of the shuffled pictures, and of the intervals.
        batch_size: Items answered at once.
        fresh: Forget the answers of an earlier run in `out`.
        quiet: Show no progress.
        run: The training run that made the model, for the report's curves; found by itself where
            `model` is a folder of a run.
        with_report: Write `report.html` and `contact_sheet.png` as well.
        extra: Functions that add scores of their own, such as a baseline (see `probe`).

    Raises:
        ConfigError: if a benchmark's file is wrong.
        EvaluationError: if anything could not be measured; nothing is left out in silence.
    """
    check_conditions(conditions)
    loaded = load_all(benchmarks)
    _ready(loaded)
    backend = _backend(model)
    folder = _out_folder(model, out)
    draw = Draw(limit, look_limit, seed)
    plan = make_plan(loaded, conditions, draw)
    processes = Processes.here()
    with processes.answers(folder, fresh=fresh) as log:
        keys = ask(plan, backend, log, batch_size=batch_size, quiet=quiet, processes=processes)
        predictions = mark_all(plan, keys, log)
    record = {"weights": backend.weights, **draw._asdict(), "sources": _sources(loaded)}
    result = _result(folder, plan, predictions, record, backend, extra)
    if processes.is_first:
        write(result)
        if with_report:
            report(result, run=_run_folder(model, run), facts=facts_of(backend))
    processes.wait()
    return result


def _result(
    folder: Path,
    plan: Sequence[Pass],
    predictions: Sequence[list[Prediction]],
    record: dict[str, Any],
    backend: Backend,
    extra: Iterable[Extra],
) -> Evaluation:
    """Turn marked answers into scores."""
    seed = int(record["seed"])
    scores = [
        summarise(each.benchmark, each.kind, each.condition, group, seed=seed)
        for each, group in zip(plan, predictions, strict=True)
    ]
    for each in plan:
        if each.condition == "image":
            for baseline in extra:
                scores += baseline(each.benchmark, each.cases, backend)
    questions = _details(plan, predictions, seed=seed)
    flat = tuple(prediction for group in predictions for prediction in group)
    return Evaluation(folder, tuple(scores), flat, {**record, "questions": questions})


def _sources(loaded: Sequence[Benchmark]) -> dict[str, Any]:
    """Say where the rows of each benchmark came from, and how it was asked."""
    return {
        each.name: {
            "dataset": each.config.dataset.to_dict(),
            "revision": each.revision,
            "settings": each.settings.to_dict(),
            "canary": each.config.canary.to_dict() if each.config.canary else None,
        }
        for each in loaded
    }


def _out_folder(model: Any, out: str | Path | None) -> Path:
    """Return where the files go: beside a model that is a folder, under `runs/` for the Hub's."""
    if out is not None:
        return Path(out)
    if not isinstance(model, str | Path):
        raise EvaluationError(
            "An evaluation of a model in memory needs to know where its files go: pass `out`."
        )
    folder = Path(model)
    return (
        folder / "eval"
        if folder.is_dir()
        else Path("runs") / str(model).replace("/", "--") / "eval"
    )


def _run_folder(model: Any, run: str | Path | None) -> Path | None:
    """Return the folder of the training run: as told, else the model's own or the one above it."""
    if run is not None:
        return Path(run)
    if not isinstance(model, str | Path):
        return None
    folder = Path(model)
    near = (folder, folder.parent)
    return next((each for each in near if (each / "log.jsonl").is_file()), None)


def _backend(model: Any) -> Backend:
    if isinstance(model, str | Path):
        from mmlm.assistant import load

        model = load(model)
    return model if hasattr(model, "likelihoods") else backend_for(model)


def _ready(loaded: Sequence[Benchmark]) -> None:
    """Ask every scorer for what it needs, before anything is answered."""
    for benchmark in loaded:
        for scorer in benchmark.scorers.values():
            scorer.ready()


def _details(
    plan: Sequence[Pass],
    predictions: Sequence[list[Prediction]],
    *,
    seed: int,
) -> list[dict[str, Any]]:
    questions: dict[tuple[str, str], dict[str, list[Prediction]]] = {}
    owner: dict[str, Benchmark] = {}
    for (benchmark, kind, condition, _), group in zip(plan, predictions, strict=True):
        owner[benchmark.name] = benchmark
        questions.setdefault((benchmark.name, kind), {})[condition] = group
    return [
        details(owner[name], kind, passes, seed=seed) for (name, kind), passes in questions.items()
    ]
