"""Captions and then boxes as text, with the question inside the encoder."""

from __future__ import annotations

import json

import pytest

from mmlm.assistant import load
from mmlm.evaluation.scorers.boxes import read_box
from mmlm.recipes import find_recipe
from mmlm.training import train
from mmlm.training.recipe import read_recipe
from tests.modeling.test_questions import CONDITIONED, FIBER, MEMORY
from tests.tiny import picture
from tests.training.tiny_run import parts


def write(folder):
    """Write captions, and questions about places whose answers are boxes."""
    captions, boxes = [], []
    for number in range(12):
        picture(number).save(folder / f"{number}.png")
        shown = {"image": f"{number}.png"}
        captions.append(shown | {"question": "Describe it.", "answer": f"noise {number}"})
        where = f"[0.{number % 9}, 0.1, 0.9, 0.8]"
        boxes.append(shown | {"question": f"Where is thing {number}?", "answer": where})
    for name, rows in (("captions", captions), ("boxes", boxes)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def recipe(folder, connector):
    stage = {"learn": ["connector.*"], "until": {"epochs": 8}, "step_tokens": 512, "peak_lr": 5e-3}
    stages = [
        stage | {"name": "coarse", "data": str(folder / "captions.jsonl")},
        stage | {"name": "fine", "data": str(folder / "boxes.jsonl")}
        | {"learn": {"connector.*": 5e-3, "language.*": 2e-3}},
    ]  # fmt: skip
    stages[1].pop("peak_lr")
    run = {"precision": "fp32", "pool_samples": 8, "device": "cpu"}
    return {"model": parts(folder) | {"connector": connector}, "stages": stages, "run": run}


@pytest.mark.slow
@pytest.mark.parametrize("connector", [FIBER, CONDITIONED, MEMORY], ids=lambda c: c["use"])
def test_captions_and_then_boxes_are_learnt_and_gone_on_with(connector, tmp_path):
    write(tmp_path)
    words = recipe(tmp_path, connector)
    result = train(words, tmp_path / "whole")
    assert [stage.name for stage in result.stages] == ["coarse", "fine"]
    assert all(stage.last_loss < stage.first_loss for stage in result.stages)
    begun = {**words, "stages": words["stages"][:1]}
    train(begun, tmp_path / "half")
    again = {**words, "model": {"from": str(tmp_path / "half")}, "stages": words["stages"][1:]}
    train(again, tmp_path / "rest")
    made = load(tmp_path / "whole", device="cpu")
    gates = [p for n, p in made.model.named_parameters() if n.endswith("_gate")]
    assert all(gate.any() for gate in gates)
    assert bool(gates) == (connector["use"] != "text_memory")
    said = made.answer("Where is thing 3?", [picture(3)], max_new_tokens=20)
    assert said == made.answer("Where is thing 3?", [picture(3)], max_new_tokens=20)
    assert read_box("[0.3, 0.1, 0.9, 0.8]") == (0.3, 0.1, 0.9, 0.8)  # what an answer is read by


@pytest.mark.slow
def test_a_step_is_the_same_packed_and_padded(tmp_path):
    write(tmp_path)
    losses = []
    for packing in ("packed", "padded"):
        words = recipe(tmp_path, CONDITIONED)
        words["stages"] = words["stages"][:1]
        words["stages"][0]["until"] = {"steps": 1}
        words["run"]["packing"] = packing
        losses.append(train(words, tmp_path / packing).stages[0].first_loss)
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_the_recipe_learns_captions_before_boxes():
    read = read_recipe("grounding")[0]
    assert [stage.name for stage in read.stages] == ["coarse", "fine"]
    assert read.model["connector"]["use"] == "fiber"
    assert find_recipe("train", "grounding").is_file()
