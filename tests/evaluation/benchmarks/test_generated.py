"""Benchmarks that need no network: drawn here, with exact answers."""

from __future__ import annotations

import pytest
from PIL import Image

from mmlm.data.builders import scenes
from mmlm.evaluation import evaluate, load_benchmark
from mmlm.evaluation.benchmarks.benchmark import load_config
from mmlm.recipes import list_recipes
from tests.evaluation.conftest import Parrot, write_rows

BUILT = [name for name in list_recipes("eval") if load_config(name).dataset.build is not None]


def test_counting_position_colour_and_reading_are_drawn_and_marked(tmp_path):
    scenes.make(tmp_path, lambda line: None, settings=scenes.Settings(each=1, each_test=7))
    benchmark = load_benchmark("scenes", data=tmp_path / "test.jsonl")
    assert benchmark.kinds == ["count", "position", "colour", "read"]
    truth = {item.image_keys: item.target.references[0] for item in benchmark.items}
    assert len(truth) == len(benchmark.items) == 28

    by_picture = {str(item.images[0]): item.target.references[0] for item in benchmark.items}
    knows = Parrot(lambda request: f"{by_picture[str(request.images[0])].title()}.")
    result = evaluate(
        knows, benchmark, tmp_path / "out", quiet=True, conditions=("image",), with_report=False
    )
    assert {score.score for score in result.scores} == {1.0}


@pytest.mark.parametrize("name", ["charts", "documents"])
def test_every_question_of_a_drawn_sheet_is_a_row(name, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    said = [("Which year has the highest value?", "1987"), ("Is it? Answer yes or no.", "yes")]
    turns = [
        {"from": role, "value": text}
        for question, answer in said
        for role, text in (("human", question), ("gpt", answer))
    ]
    row = {"id": "test-0", "image": "0.png", "conversations": turns, "form": "line",
           "kinds": ["most", "compare"], "layout": "form"}  # fmt: skip
    benchmark = load_benchmark(name, data=write_rows(tmp_path, [row]))
    assert [item.id for item in benchmark.items] == ["test-0/0", "test-0/1"]
    assert [benchmark.prompt(item) for item in benchmark.items] == [said[0][0], said[1][0]]
    if name == "charts":
        # Five percent would forgive every year.
        scorer = benchmark.scorers["most"]
        assert scorer.mark("1988", benchmark.items[0].target).score == 0.0


def test_every_benchmark_that_is_built_names_a_builder():
    from mmlm.data.builders import BUILDERS

    assert {"scenes", "charts", "documents"} <= set(BUILT)
    assert {load_config(name).dataset.build for name in BUILT} <= set(BUILDERS)
