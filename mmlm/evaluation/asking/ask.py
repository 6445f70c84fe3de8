"""Answers what the log does not hold yet, and marks what it holds.

    plan ──► asking ──► answers.jsonl ──► results
             you are here

Items of like length share a batch; each answer is on the disk before the next batch begins.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, isfinite
from typing import Any

from mmlm.errors import EvaluationError
from mmlm.evaluation.asking.answers import AnswerLog, answer_key
from mmlm.evaluation.asking.backend import Backend
from mmlm.evaluation.asking.processes import Processes
from mmlm.evaluation.benchmarks.benchmark import Benchmark
from mmlm.evaluation.benchmarks.conditions import Case
from mmlm.evaluation.benchmarks.plan import Pass
from mmlm.evaluation.results import Prediction, check_lengths, predict_all
from mmlm.reports.progress import ProgressLine

_HANDFUL = 3
"""A handful of pictures has the questions of about so many batches."""


@dataclass(frozen=True)
class _Job:
    key: str
    case: Case
    benchmark: Benchmark


def ask(
    plan: Sequence[Pass],
    backend: Backend,
    log: AnswerLog,
    *,
    batch_size: int,
    quiet: bool,
    processes: Processes,
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
    batches = processes.share(_batches(list(jobs.values()), batch_size))
    total = sum(map(len, batches))
    with ProgressLine("answering", total, quiet=quiet or not processes.is_first) as progress:
        for batch in batches:
            log.append(_answer_batch(batch, backend))
            case = batch[0].case
            progress.advance(len(batch), note=f"{case.benchmark} ({case.condition})")
    processes.gather(log.path.parent, log)
    return keys


def _batches(jobs: list[_Job], batch_size: int) -> list[list[_Job]]:
    """Put jobs into batches: of one picture together, of like length together.

    A backend reads a picture once for all questions about it, as long as they follow one
    another. So pictures are put into handfuls, those with long questions together; within a
    handful, jobs that are answered in the same way share a batch. The handfuls come in random
    order, so that the time left is an honest guess.
    """
    by_picture: dict[tuple[str, ...], list[_Job]] = {}
    for job in jobs:
        by_picture.setdefault(job.case.image_keys or (job.key,), []).append(job)

    def weight(members: list[_Job]) -> tuple[int, int, str]:
        longest = max(len(job.case.prompt) for job in members)
        return len(members[0].case.images), longest, members[0].key

    handfuls: list[list[_Job]] = [[]]
    for members in sorted(by_picture.values(), key=weight):
        if len(handfuls[-1]) >= _HANDFUL * batch_size or _unlike(handfuls[-1], members):
            handfuls.append([])
        handfuls[-1] += members
    random.Random(0).shuffle(handfuls)
    return [batch for handful in handfuls for batch in _of_one_kind(handful, batch_size)]


def _unlike(handful: Sequence[_Job], members: Sequence[_Job]) -> bool:
    return bool(handful) and len(handful[0].case.images) != len(members[0].case.images)


def _of_one_kind(handful: Sequence[_Job], batch_size: int) -> list[list[_Job]]:
    """Split a handful into batches that are answered with the same settings, evenly filled."""
    groups: dict[tuple[str, str], list[_Job]] = {}
    for job in handful:
        settings = json.dumps(job.benchmark.settings.to_dict(), sort_keys=True)
        groups.setdefault((settings, job.benchmark.config.decide), []).append(job)
    batches: list[list[_Job]] = []
    for members in groups.values():
        size = ceil(len(members) / ceil(len(members) / batch_size))
        batches += [members[start : start + size] for start in range(0, len(members), size)]
    return batches


def _answer_batch(batch: Sequence[_Job], backend: Backend) -> list[dict[str, Any]]:
    found = [job.case for job in batch]
    benchmark = batch[0].benchmark
    if benchmark.config.decide == "likelihood":
        given = backend.likelihoods(found)
        _check_finite(found, given)
        values: list[dict[str, Any]] = [
            {"likelihoods": [round(value, 6) for value in each]} for each in given
        ]
    else:
        values = [{"answer": text} for text in backend.answer(found, benchmark.settings)]
        check_lengths(found, [value["answer"] for value in values])
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


def _check_finite(found: Sequence[Case], given: Sequence[Sequence[float]]) -> None:
    """Refuse likelihoods of which one is no number: the largest of them would mean nothing."""
    for case, values in zip(found, given, strict=False):
        if len(values) != len(case.choices) or not all(map(isfinite, values)):
            raise EvaluationError(
                f"{case.benchmark}, item {case.item.id}, has {len(case.choices)} choices, and the "
                f"model gives {list(values)} as their likelihoods; one finite number for each was "
                f"expected. Load it with dtype float32, or look for the step at which training "
                f"broke."
            )


def _text(line: dict[str, Any], case: Case) -> str:
    """Return an answer as text; by likelihood, the first of the likeliest choices."""
    if "likelihoods" not in line:
        return str(line["answer"])
    likelihoods = line["likelihoods"]
    return case.choices[max(range(len(likelihoods)), key=likelihoods.__getitem__)]


def mark_all(
    plan: Sequence[Pass], keys: Sequence[Sequence[str]], log: AnswerLog
) -> list[list[Prediction]]:
    """Mark the answers of every pass."""
    marked: list[list[Prediction]] = []
    for (benchmark, kind, _, found), own in zip(plan, keys, strict=True):
        answers = [_text(log[key], case) for case, key in zip(found, own, strict=True)]
        marked.append(predict_all(benchmark.scorers[kind], found, answers))
    return marked
