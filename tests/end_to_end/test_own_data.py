"""From a user's own file to answers, through the command line alone."""

from __future__ import annotations

import csv
import json

import pytest

import mmlm
from mmlm.cli import run
from tests.tiny import picture, save_language, save_vision

QUESTION = "Which one?"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with pictures, a CSV and a JSONL of the same rows, a recipe and a benchmark."""
    folder = tmp_path_factory.mktemp("own")
    save_vision(folder / "eye", "clip")
    save_language(folder / "words", "llama")
    rows = []
    for number in range(8):
        picture(number).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": QUESTION, "answer": "ab"[number % 2]})
    with (folder / "mine.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["image", "question", "answer"])
        writer.writeheader()
        writer.writerows(rows)
    lines = [json.dumps({"id": index, **row}) for index, row in enumerate(rows)]
    (folder / "mine.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "recipe.yaml").write_text(
        """
        model:
          vision:    {use: hf, checkpoint: eye, layer: -2}
          connector: {use: mlp, depth: 2}
          language:  {use: causal_lm, checkpoint: words}
        stages:
          - {name: align, learn: [connector.*], data: mine.csv, until: {epochs: 2},
             peak_lr: 1.0e-2, step_tokens: 128}
          - {name: instruct, learn: [connector.*, language.*, head.*], data: mine.jsonl,
             until: {epochs: 40}, peak_lr: 1.0e-2, step_tokens: 256}
        run: {precision: fp32, feature_cache: off}
        """.replace("eye", str(folder / "eye")).replace("words", str(folder / "words")),
        encoding="utf-8",
    )
    (folder / "bench.yaml").write_text(
        """
        dataset: {path: mine.jsonl}
        question: "{question}"
        image: image
        answer: answer
        scorer: exact
        generate: {max_new_tokens: 4}
        """,
        encoding="utf-8",
    )
    assert run(["train", str(folder / "recipe.yaml"), "--out", str(folder / "run")]) == 0
    return folder


def test_the_run_folder_holds_a_stock_model_a_delta_and_the_recipe(place):
    model = place / "run/model"
    assert json.loads((model / "config.json").read_text())["architectures"] == [
        "LlavaForConditionalGeneration"
    ]
    for folder in (model, place / "run/delta"):
        assert (folder / "recipe.resolved.yaml").is_file()
    log = [json.loads(line) for line in (place / "run/log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < losses[0] / 2


def test_the_same_command_again_finds_it_done(place, capsys):
    assert run(["train", str(place / "recipe.yaml"), "--out", str(place / "run")]) == 0


def test_another_recipe_into_the_same_folder_is_an_error_that_says_what_changed(place, capsys):
    words = ["train", str(place / "recipe.yaml"), "stages.align.peak_lr=5e-4"]
    assert run([*words, "--out", str(place / "run")]) == 1
    assert "peak_lr" in capsys.readouterr().err


def test_it_is_measured_with_the_image_blind_and_shuffled(place):
    out = place / "scores"
    assert run(["eval", str(place / "run"), str(place / "bench.yaml"), "--out", str(out)]) == 0
    rows = json.loads((out / "results.json").read_text())
    score = {row["condition"]: row["score"] for row in rows}
    assert set(score) == {"image", "blind", "shuffled"}
    # Eight pictures, learnt by heart: with its picture every answer is right, without it half.
    assert score["image"] == 1.0
    assert score["blind"] <= 0.5


def test_the_chat_answers_about_a_picture(place, capsys):
    words = ["chat", str(place / "run"), "--image", str(place / "1.png"), "--prompt", QUESTION]
    assert run(words) == 0
    assert capsys.readouterr().out.strip().endswith("b")


def test_python_gives_the_same_answer_from_the_stock_folder_and_from_the_delta(place):
    for folder in ("run", "run/delta"):
        assistant = mmlm.load(place / folder)
        assert assistant.answer(QUESTION, [place / "2.png"], max_new_tokens=4) == "a"


def test_a_table_becomes_splits_a_training_and_a_measurement(place, capsys):
    made, out = place / "new", place / "new-run"
    assert run(["data", "new", str(place / "mine.csv"), "--out", str(made)]) == 0
    assert "splits      train 6, validation 1, test 1" in capsys.readouterr().out
    parts = {"vision": place / "eye", "language": place / "words"}
    lines = [f"model.{part}.checkpoint={folder}" for part, folder in parts.items()]
    lines.append("run.precision=fp32")
    recipe = str(made / "recipe.yaml")
    assert run(["check", recipe, *lines]) == 0
    assert "validation  1 rows in stage align" in capsys.readouterr().out
    assert run(["train", recipe, *lines, "--out", str(out)]) == 0
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in log if "validation_loss" in row} == {"align", "instruct"}
    words = ["eval", str(out), str(made / "benchmark.yaml"), "--conditions", "image", "blind"]
    assert run([*words, "--out", str(made / "scores")]) == 0
    scores = json.loads((made / "scores/results.json").read_text())
    assert {row["n"] for row in scores} == {1}
