"""The nearest neighbour: right where features say so, silent where it cannot answer."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from mmlm.errors import DataError, EvaluationError
from mmlm.evaluation import evaluate, load_benchmark
from mmlm.evaluation.benchmarks.conditions import cases
from mmlm.evaluation.probes.nearest import NearestNeighbour, Remembered, remember
from tests.evaluation.conftest import THINGS, Parrot, sees, write_rows


def mean_colour(pictures):
    rows = []
    for picture in pictures:
        with Image.open(picture) as image:
            rows.append(
                [value + 1.0 for value in image.convert("RGB").resize((1, 1)).getpixel((0, 0))]
            )
    return torch.tensor(rows)


@pytest.fixture
def memory(tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    for name in THINGS:
        Image.new("RGB", (4, 4), name).save(folder / f"{name}.png")
    rows = [{"image": f"{name}.png", "answer": f"The {name}.", "thing": name} for name in THINGS]
    return remember(write_rows(folder, rows))


def test_labels_come_from_every_column_and_row(memory):
    assert len(memory) == len(THINGS)
    assert memory[0].labels == {"red"}


def test_it_stands_in_the_results_of_the_same_run(colours, tmp_path, memory):
    neighbour = NearestNeighbour(memory, encode=mean_colour)
    result = evaluate(
        Parrot(sees), colours / "colours.yaml", tmp_path / "out", quiet=True, extra=[neighbour]
    )
    score = result.score("colours", "choice", "nearest_neighbour")
    assert (score.score, score.n, score.chance) == (1.0, 12, 0.25)
    names = {(s.question, s.condition) for s in result.scores}
    assert ("name", "nearest_neighbour") not in names


def test_items_with_an_option_that_it_never_saw_are_left_out(colours, memory):
    benchmark = load_benchmark(colours / "colours.yaml")
    few = [each for each in memory if "white" not in each.labels]
    found = cases(benchmark, "image", [i for i in benchmark.items if i.kind == "choice"], seed=0)
    (score,) = NearestNeighbour(few, encode=mean_colour)(benchmark, found, None)
    assert score.n == sum("white" not in case.choices for case in found) < 12


def test_without_any_known_option_there_is_no_score(colours):
    benchmark = load_benchmark(colours / "colours.yaml")
    found = cases(benchmark, "image", benchmark.items, seed=0)
    memory = [Remembered("x.png", frozenset({"elephant"}))]
    assert NearestNeighbour(memory, encode=mean_colour)(benchmark, found, None) == []


def test_a_model_without_an_encoder_is_refused(colours, tmp_path, memory):
    with pytest.raises(EvaluationError, match="needs an encoder"):
        evaluate(
            Parrot(sees), colours / "colours.yaml", tmp_path / "out", quiet=True,
            extra=[NearestNeighbour(memory)],
        )  # fmt: skip


def test_rows_without_labels_are_refused(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="no row with a picture"):
        remember(write_rows(tmp_path, [{"image": "a.png", "caption": "x"}]))
