"""Runs benchmarks: every item in every condition, each answer on disk as soon as it is there.

    benchmark, conditions ──► runner ──► answers.jsonl ──► results ──► reports
                              you are here

A run that was killed goes on with the same command: answers are found again by what they
depend on (see `answers`). Items of like length share a batch. The files of a run:

    answers.jsonl       the log: one line for each answer, in the order of answering
    predictions.jsonl   one line for each item and condition: question, answer, truth, mark
    results.json        the scores; `results` says what the fields mean
    details.json        groups, differences between conditions, further metrics, what was run
    report.html         the same for people, with pictures; contact_sheet.png likewise
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from mmlm.errors import EvaluationError
from mmlm.evaluation.answers import AnswerLog, answer_key
from mmlm.evaluation.backend import Backend, backend_for
from mmlm.evaluation.benchmark import Benchmark, load_benchmark
from mmlm.evaluation.conditions import CONDITIONS, Case, Condition, cases, subset
from mmlm.evaluation.report import facts_of, report
from mmlm.evaluation.results import Prediction, Score, details, predict_all, summarise
from mmlm.evaluation.schema import BenchmarkConfig
from mmlm.reports import plain_table, scores_table
from mmlm.reports.progress import ProgressLine
from mmlm.storage import write_atomic

DEFAULT_CONDITIONS: tuple[Condition, ...] = ("image", "blind", "shuffled")

_MOST_CHARACTERS = 200_000


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


class _Pass(NamedTuple):
    """One kind of question of a benchmark in one condition."""

    benchmark: Benchmark
    kind: str
    condition: Condition
    cases: list[Case]


class _Draw(NamedTuple):
    """How many items are asked, and which."""

    limit: int | None
    look_limit: int | None
    seed: int


@dataclass(frozen=True)
class _Job:
    key: str
    case: Case
    benchmark: Benchmark


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
    extra: Iterable[Callable[[Benchmark, Sequence[Case], Backend], list[Score]]] = (),
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
    _check_conditions(conditions)
    loaded = load_all(benchmarks)
    _ready(loaded)
    backend = _backend(model)
    folder = _out_folder(model, out)
    log_path = folder / "answers.jsonl"
    if fresh:
        log_path.unlink(missing_ok=True)
    draw = _Draw(limit, look_limit, seed)
    plan = _plan(loaded, conditions, draw)
    with AnswerLog(log_path) as log:
        keys = _answer(plan, backend, log, batch_size=batch_size, quiet=quiet)
        predictions = _marked(plan, keys, log)
    scores = [
        summarise(each.benchmark, each.kind, each.condition, group, seed=seed)
        for each, group in zip(plan, predictions, strict=True)
    ]
    for each in plan:
        if each.condition == "image":
            for baseline in extra:
                scores += baseline(each.benchmark, each.cases, backend)
    record = {
        "weights": backend.weights,
        **draw._asdict(),
        "settings": {each.name: each.settings.to_dict() for each in loaded},
        "questions": _details(plan, predictions, seed=seed),
    }
    flat = tuple(prediction for group in predictions for prediction in group)
    result = Evaluation(folder, tuple(scores), flat, record)
    _write(result)
    if with_report:
        report(result, run=_run_folder(model, run), facts=facts_of(backend))
    return result


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


def load_all(benchmarks: Any) -> list[Benchmark]:
    """Read one or several benchmarks, and refuse two of the same name."""
    several = benchmarks if isinstance(benchmarks, list | tuple) else [benchmarks]
    loaded = [each if isinstance(each, Benchmark) else load_benchmark(each) for each in several]
    if not loaded:
        raise EvaluationError("No benchmark was named. `mmlm recipes` lists them.")
    names = [benchmark.name for benchmark in loaded]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise EvaluationError(
            f"Two benchmarks are called {', '.join(twice)}. Name each once, or give one a `set:`."
        )
    return loaded


def _backend(model: Any) -> Backend:
    if isinstance(model, str | Path):
        from mmlm.assistant import load

        model = load(model)
    return model if hasattr(model, "likelihoods") else backend_for(model)


def _check_conditions(conditions: Sequence[str]) -> None:
    unknown = [name for name in conditions if name not in CONDITIONS]
    if unknown or not conditions or len(set(conditions)) < len(conditions):
        raise EvaluationError(
            f"conditions must be different ones of {', '.join(CONDITIONS)} "
            f"(got {list(conditions)!r})."
        )


def _plan(loaded: Sequence[Benchmark], conditions: Sequence[Condition], draw: _Draw) -> list[_Pass]:
    """Return every pass that has items: the drawn items of a kind, in a condition."""
    plan: list[_Pass] = []
    for benchmark in loaded:
        for kind in benchmark.kinds:
            every = [item for item in benchmark.items if item.kind == kind]
            own, look = benchmark.config.draw, benchmark.config.look_draw
            own = own.get(kind) if isinstance(own, dict) else own
            drawn = subset(every, _least(draw.limit, own), seed=draw.seed)
            for condition in conditions:
                limit = None if condition == "image" else _least(draw.look_limit, look)
                items = subset(drawn, limit, seed=draw.seed)
                found = cases(benchmark, condition, items, seed=draw.seed)
                if found:
                    plan.append(_Pass(benchmark, kind, condition, found))
    return plan


def _least(asked: int | None, own: int | None) -> int | None:
    """Return the smaller of what the caller and the benchmark say, None where neither does."""
    return min((limit for limit in (asked, own) if limit is not None), default=None)


def _answer(
    plan: Sequence[_Pass],
    backend: Backend,
    log: AnswerLog,
    *,
    batch_size: int,
    quiet: bool,
) -> list[list[str]]:
    """Answer what the log does not hold yet; return the key of every case."""
    keys: list[list[str]] = []
    jobs: dict[str, _Job] = {}
    for benchmark, _, _, found in plan:
        settings, decide = benchmark.settings.to_dict(), benchmark.config.decide
        own = [
            answer_key(case, weights=backend.weights, settings=settings, decide=decide)
            for case in found
        ]
        keys.append(own)
        for key, case in zip(own, found, strict=True):
            if key not in log:
                jobs.setdefault(key, _Job(key, case, benchmark))
    batches = _batches(list(jobs.values()), batch_size)
    with ProgressLine("answering", len(jobs), quiet=quiet) as progress:
        for batch in batches:
            log.append(_answer_batch(batch, backend))
            case = batch[0].case
            progress.advance(len(batch), note=f"{case.benchmark} ({case.condition})")
    return keys


def _batches(jobs: list[_Job], batch_size: int) -> list[list[_Job]]:
    """Put jobs of like length together; the batches themselves are in random order.

    So the time left is an honest guess: sorted batches would keep the slow ones for the end.
    """

    def kind(job: _Job) -> tuple[str, str]:
        settings = json.dumps(job.benchmark.settings.to_dict(), sort_keys=True)
        return settings, job.benchmark.config.decide

    def length(job: _Job) -> tuple[int, int, str]:
        return len(job.case.images), len(job.case.prompt), job.key

    groups: dict[tuple[str, str], list[_Job]] = {}
    for job in jobs:
        groups.setdefault(kind(job), []).append(job)
    batches: list[list[_Job]] = []
    for members in groups.values():
        members.sort(key=length)
        batches += [
            members[start : start + batch_size] for start in range(0, len(members), batch_size)
        ]
    random.Random(0).shuffle(batches)
    return batches


def _answer_batch(batch: Sequence[_Job], backend: Backend) -> list[dict[str, Any]]:
    found = [job.case for job in batch]
    benchmark = batch[0].benchmark
    if benchmark.config.decide == "likelihood":
        values: list[dict[str, Any]] = [
            {"likelihoods": [round(value, 6) for value in values]}
            for values in backend.likelihoods(found)
        ]
    else:
        values = [{"answer": text} for text in backend.answer(found, benchmark.settings)]
        _check_lengths(found, [value["answer"] for value in values])
    if len(values) != len(found):
        raise EvaluationError(
            f"{len(found)} questions were asked and {len(values)} answers came back; which belongs "
            f"to which cannot be known."
        )
    return [
        {
            "key": job.key,
            "set": job.case.benchmark,
            "condition": job.case.condition,
            "id": job.case.item.id,
            **value,
        }
        for job, value in zip(batch, values, strict=True)
    ]


def _check_lengths(found: Sequence[Case], answers: Sequence[str]) -> None:
    """Refuse an answer that no scorer should read; cutting it would score something else."""
    for case, answer in zip(found, answers, strict=False):
        if len(answer) > _MOST_CHARACTERS:
            raise EvaluationError(
                f"The answer to {case.benchmark}, item {case.item.id}, has {len(answer):,} "
                f"characters; at most {_MOST_CHARACTERS:,} are scored. Lower "
                f"generate.max_new_tokens, or look at what answers."
            )


def _text(line: dict[str, Any], case: Case) -> str:
    """Return an answer as text; by likelihood, the first of the likeliest choices."""
    if "likelihoods" not in line:
        return str(line["answer"])
    likelihoods = line["likelihoods"]
    return case.choices[max(range(len(likelihoods)), key=likelihoods.__getitem__)]


def _ready(loaded: Sequence[Benchmark]) -> None:
    """Ask every scorer for what it needs, before anything is answered."""
    for benchmark in loaded:
        for scorer in benchmark.scorers.values():
            scorer.ready()


def _marked(
    plan: Sequence[_Pass], keys: Sequence[Sequence[str]], log: AnswerLog
) -> list[list[Prediction]]:
    """Mark the answers of every pass."""
    marked: list[list[Prediction]] = []
    for (benchmark, kind, _, found), own in zip(plan, keys, strict=True):
        answers = [_text(log[key], case) for case, key in zip(found, own, strict=True)]
        marked.append(predict_all(benchmark.scorers[kind], found, answers))
    return marked


def _details(
    plan: Sequence[_Pass],
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


def _write(result: Evaluation) -> None:
    lines = (json.dumps(p.to_dict(), ensure_ascii=False) for p in result.predictions)
    _write_text(result.out / "predictions.jsonl", "".join(line + "\n" for line in lines))
    _write_text(result.out / "details.json", json.dumps(result.details, indent=2) + "\n")
    # Last, so that a folder with results.json is a folder whose run is complete.
    scores = [score.to_dict() for score in result.scores]
    _write_text(result.out / "results.json", json.dumps(scores, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    try:
        write_atomic(path, text)
    except OSError as error:
        raise EvaluationError(
            f"{path} cannot be written: {error}. The answers are kept; make room and run the same "
            f"command again."
        ) from None
