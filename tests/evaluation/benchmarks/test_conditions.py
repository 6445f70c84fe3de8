"""Conditions: a shuffled picture is always of another thing, and always the same one."""

from __future__ import annotations

import pytest

from mmlm.errors import EvaluationError
from mmlm.evaluation import Benchmark, BenchmarkConfig, Item
from mmlm.evaluation.benchmarks.conditions import cases, derange, subset
from mmlm.evaluation.scorers import Target, read_scorer
from mmlm.generation import GenerationSettings


def made(things, *, num_images=1):
    items = tuple(
        Item(
            id=str(n),
            kind="choice",
            columns={"question": "What?"},
            images=(f"{n}.png",) * num_images,
            image_keys=tuple(f"key{n}-{m}" for m in range(num_images)),
            target=Target(("x",), ("x", "y", "z")),
            thing=thing,
        )
        for n, thing in enumerate(things)
    )
    config = BenchmarkConfig.from_dict({"dataset": {"path": "x.jsonl"}})
    scorers = {"choice": read_scorer("choice", origin="test")}
    return Benchmark("made", config, items, scorers, GenerationSettings())


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    "things",
    [
        ["a", "b"],
        ["a", "a", "b", "b"],
        ["a"] * 10 + ["b"] * 10,
        ["a"] * 5 + ["b"] * 3 + ["c"] * 2,
        [str(n % 7) for n in range(100)],
        [""] * 9,
    ],
    ids=len,
)
def test_every_picture_is_used_once_and_never_of_the_same_thing(things, seed):
    benchmark = made(things)
    partner = derange(benchmark, seed=seed)

    assert sorted(other.id for other in partner.values()) == sorted(partner)
    for item in benchmark.items:
        assert partner[item.id].id != item.id
        assert not item.thing or partner[item.id].thing != item.thing


def test_a_thing_in_most_pictures_is_shown_pictures_of_the_others():
    benchmark = made(["a"] * 9 + ["b"])
    partner = derange(benchmark, seed=0)
    assert all(partner[item.id].thing != item.thing for item in benchmark.items)


def test_pictures_that_all_show_the_same_cannot_be_shuffled():
    with pytest.raises(EvaluationError, match="shows the same"):
        derange(made(["a"] * 4), seed=0)


def test_the_pairs_depend_on_the_seed_alone():
    benchmark = made([str(n % 5) for n in range(50)])
    pairs = [{k: v.id for k, v in derange(benchmark, seed=s).items()} for s in (1, 1, 2)]
    assert pairs[0] == pairs[1] != pairs[2]


def test_a_subset_keeps_the_pairs_of_the_whole():
    benchmark = made([str(n % 5) for n in range(50)])
    whole = {
        case.item.id: case.shown_from
        for case in cases(benchmark, "shuffled", benchmark.items, seed=0)
    }
    few = cases(benchmark, "shuffled", subset(benchmark.items, 7, seed=0), seed=0)
    assert len(few) == 7
    assert all(whole[case.item.id] == case.shown_from for case in few)


def test_permuted_choices_are_the_same_in_another_order():
    benchmark = made(["a", "b", "c"])
    for case in cases(benchmark, "permuted", benchmark.items, seed=0):
        assert sorted(case.choices) == ["x", "y", "z"]
        assert case.choices != ("x", "y", "z")


def test_text_alone_has_no_blind_and_no_shuffled_case():
    benchmark = made(["a", "b"], num_images=0)
    assert cases(benchmark, "blind", benchmark.items, seed=0) == []
    assert cases(benchmark, "shuffled", benchmark.items, seed=0) == []


def test_blind_cases_show_nothing():
    benchmark = made(["a", "b"], num_images=2)
    found = cases(benchmark, "blind", benchmark.items, seed=0)
    assert [case.images for case in found] == [(), ()]
