"""What is asked: which items of which benchmarks, in which conditions.

benchmark, conditions ──► plan ──► asking ──► results
                          you are here
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from mmlm.errors import EvaluationError
from mmlm.evaluation.benchmarks.benchmark import Benchmark, load_benchmark
from mmlm.evaluation.benchmarks.conditions import CONDITIONS, Case, Condition, cases, subset


class Pass(NamedTuple):
    """One kind of question of a benchmark in one condition."""

    benchmark: Benchmark
    kind: str
    condition: Condition
    cases: list[Case]


class Draw(NamedTuple):
    """How many items are asked, and which."""

    limit: int | None
    look_limit: int | None
    seed: int


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


def check_conditions(conditions: Sequence[str]) -> None:
    """Refuse conditions that do not exist or stand twice."""
    unknown = [name for name in conditions if name not in CONDITIONS]
    if unknown or not conditions or len(set(conditions)) < len(conditions):
        raise EvaluationError(
            f"conditions must be different ones of {', '.join(CONDITIONS)} "
            f"(got {list(conditions)!r})."
        )


def make_plan(
    loaded: Sequence[Benchmark], conditions: Sequence[Condition], draw: Draw
) -> list[Pass]:
    """Return every pass that has items: the drawn items of a kind, in a condition."""
    plan: list[Pass] = []
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
                    plan.append(Pass(benchmark, kind, condition, found))
    return plan


def _least(asked: int | None, own: int | None) -> int | None:
    """Return the smaller of what the caller and the benchmark say, None where neither does."""
    return min((limit for limit in (asked, own) if limit is not None), default=None)
