"""`mmlm eval` with what stands beside a plain run: baseline, dialects, contamination, probes."""

from __future__ import annotations

import json

import pytest

from mmlm.cli import run
from tests.tiny import compose_tiny

from .conftest import write_rows


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    compose_tiny(folder / "parts").save(folder / "new")
    compose_tiny(folder / "others", vision="siglip").save(folder / "old")
    return folder


def files(out):
    return {path.name for path in out.iterdir()}


def test_two_checkpoints_and_all_dialects_in_one_command(models, colours, tmp_path, capsys):
    file, out = colours / "colours.yaml", tmp_path / "out"
    file.write_text(file.read_text() + "generate: {max_new_tokens: 2}\n")
    words = ["eval", str(models / "new"), str(file), "--out", str(out), "--limit", "4"]
    more = ["--baseline", str(models / "old"), "--dialects", "--look-limit", "2", "--card"]
    assert run([*words, *more]) == 0
    assert "| colours | name | 4 |" in (models / "new" / "README.md").read_text()
    told = capsys.readouterr().out
    assert "visible from" in told
    assert "picture     colours · name: " in told
    assert "at most 2 of each kind" in told
    assert "name *" not in told  # `name` has one dialect, which is in use
    assert {"comparison.json", "dialects-colours.json"} <= files(out)
    # The baseline was measured into the same folder; its folder of answers serves as well.
    again = [*words[:-2], "--limit", "4", "--baseline", str(out / "baseline")]
    assert run(again) == 0
    changes = json.loads((out / "comparison.json").read_text())["changes"]
    assert [change["n"] for change in changes] == [4, 4]

    assert run(["eval", str(out / "predictions.jsonl"), str(file), "--dialects"]) == 0
    assert run(["eval", str(out / "predictions.jsonl"), str(file)]) == 2
    assert "read with --dialects" in capsys.readouterr().err


def test_training_data_and_encoder_are_looked_into(models, colours, tmp_path, capsys):
    pytest.importorskip("sklearn")
    file, out = colours / "colours.yaml", tmp_path / "out"
    file.write_text(file.read_text() + "generate: {max_new_tokens: 1}\n")
    row = {"id": "1", "image": "0.png", "question": "Which colour?", "answer": "red"}
    write_rows(colours, [row], "train.jsonl")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{vision: {{}}, language: {{}}}}\nstages:\n  - {{name: a, learn: [connector.*], "
        f"data: {colours / 'train.jsonl'}, until: {{epochs: 1}}}}\n"
    )
    words = ["eval", str(models / "new"), str(file), "--out", str(out), "--limit", "2",
             "--conditions", "image", "--contamination", str(recipe), "--probe"]  # fmt: skip
    assert run(words) == 0
    told = capsys.readouterr().out
    assert "Found in the training data" in told
    assert "The frozen encoder" in told
    (found,) = json.loads((out / "contamination.json").read_text())
    assert found["num_training_samples"] == 1
    assert json.loads((out / "probe.json").read_text())["encoder"]


def test_choices_by_likelihood_need_choices(models, colours, capsys):
    assert run(["eval", str(models / "new"), str(colours / "colours.yaml"), "--likelihood"]) == 2
    assert "no choices that could be compared" in capsys.readouterr().err


def test_a_benchmark_that_cannot_be_measured_ends_in_failure(models, colours, capsys):
    (colours / "3.png").unlink()
    assert run(["eval", str(models / "new"), str(colours / "colours.yaml")]) == 1
    assert "2 of 24 rows cannot be measured" in capsys.readouterr().err


def test_scores_are_written_into_a_folder_alone(colours, capsys):
    assert run(["eval", "org/model", str(colours / "colours.yaml"), "--card"]) == 2
    assert "--card needs a model folder" in capsys.readouterr().err


def test_a_suite_or_a_benchmark_must_be_named(models, capsys):
    assert run(["eval", str(models / "new")]) == 2
    assert "name a benchmark, or a --suite" in capsys.readouterr().err
    assert run(["eval", str(models / "new"), "--suite", "oct"]) == 1
    assert "Did you mean 'ocr'" in capsys.readouterr().err
