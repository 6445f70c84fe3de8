"""Rows that are never learnt: measured, remembered, and decisive."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from mmlm.errors import DataError, TrainingError
from mmlm.reports.files import read_run
from mmlm.reports.page import page
from mmlm.training import train
from mmlm.training.checkpoint import load_checkpoint
from mmlm.training.recipe import read_recipe
from mmlm.training.validation import Validation
from tests.tiny import picture
from tests.training.test_resume import StopHereError, assert_crashes_change_nothing, crash_at
from tests.training.tiny_run import WORDS, tiny_recipe, write_rows


def write_held_out(folder, count=6, *, bad=0):
    """Validation rows over pictures that the training rows do not have."""
    rows = []
    for index in range(count):
        picture(100 + index).save(folder / f"held{index}.png")
        rows.append({"image": f"held{index}.png", "question": "What is it?",
                     "answer": WORDS[index % len(WORDS)]})  # fmt: skip
    rows += [{"image": "lost.png", "question": "a", "answer": "b"}] * bad
    path = folder / "held_out.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def recipe_with(folder, stages=None, run=None, **validation):
    values = tiny_recipe(folder, **(run or {}))
    if stages is not None:
        values["stages"] = values["stages"][stages]
    words = {"data": write_held_out(folder), "every_steps": 2, "answers": 2, "max_new_tokens": 2}
    return {**values, "validation": {**words, **validation}}


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses_of(out, stage="align"):
    rows = [row for row in log_of(out) if "validation_loss" in row and row["stage"] == stage]
    return {row["step"]: row["validation_loss"] for row in rows}


def test_the_loss_is_measured_before_between_and_after_and_the_pictures_are_asked(tmp_path):
    result = train(recipe_with(tmp_path), tmp_path / "run", quiet=True)
    for stage in result.stages:
        losses = losses_of(tmp_path / "run", stage.name)
        wanted = {0, stage.steps, *range(2, stage.steps + 1, 2)}
        assert set(losses) == wanted
        assert stage.validation_loss == min(losses.values()) < losses[0]
        assert losses[stage.best_step] == stage.validation_loss
    growth = (tmp_path / "run/growth.jsonl").read_text().splitlines()
    assert {answer["id"].split("/")[0] for line in growth
            for answer in json.loads(line)["answers"]} == {"held_out"}  # fmt: skip
    shown = page(read_run(tmp_path / "run", None), title="a")
    assert "Loss on rows never learnt" in shown


def test_the_loss_is_that_of_the_model_alone_on_each_row(tmp_path):
    """The definition: each sample by itself through the saved model, summed over its tokens."""
    from mmlm.data import open_mixture
    from mmlm.data.collate import MMLMCollator

    values = recipe_with(tmp_path, slice(0, 1), keep="last")
    result = train(values, tmp_path / "run", quiet=True)
    assistant = result.assistant
    mixture = open_mixture(values["validation"]["data"], folder=tmp_path, shuffle=False)
    total, count = 0.0, 0
    collate = MMLMCollator(assistant.processor)
    for row in range(6):
        batch = collate([mixture.sources[0].sample(row)])
        with torch.no_grad():
            loss = assistant.model(**batch).loss
        learnt = int((batch["labels"][:, 1:] != -100).sum())
        total, count = total + float(loss) * learnt, count + learnt
    # Packed against alone, in float32: sums of a hundred numbers in another order.
    assert losses_of(tmp_path / "run")[result.stages[0].steps] == pytest.approx(total / count, 1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_measuring_changes_no_bit_of_what_is_learnt(tmp_path, precision):
    values = recipe_with(tmp_path, run={"precision": precision}, keep="last")
    train(values, tmp_path / "measured", quiet=True)
    del values["validation"]
    train(values, tmp_path / "plain", quiet=True)
    files = [tmp_path / name / "model/model.safetensors" for name in ("measured", "plain")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_stage_ends_with_its_best_weights(tmp_path, precision, monkeypatch):
    # The loss is told to be lowest in the middle, so that the best weights are not the last.
    real, measured, kept = Validation.measure, [], {}

    def lowest_at_the_third(self):
        loss, samples = real(self)
        measured.append(loss)
        weights = {n: p.detach().clone() for n, p in self._model.named_parameters()}
        kept[len(measured)] = weights
        return abs(len(measured) - 3.0), samples

    monkeypatch.setattr(Validation, "measure", lowest_at_the_third)
    values = recipe_with(tmp_path, slice(0, 1), run={"precision": precision})
    result = train(values, tmp_path / "run", quiet=True)
    assert (result.stages[0].best_step, result.stages[0].validation_loss) == (4, 0.0)
    assert len(measured) > 4
    (place,) = (tmp_path / "run/checkpoints/align").glob("best-*")
    finished = load_checkpoint(next((tmp_path / "run/checkpoints/align").glob("step-*")))
    best = load_file(place / "weights.safetensors")
    assert best.keys() == finished.weights.keys()
    assert all(torch.equal(finished.weights[name], best[name]) for name in best)
    for name, value in kept[3].items():
        if "connector" in name:
            assert torch.equal(best[name].to(value.dtype), value)
            assert not torch.equal(kept[len(measured)][name], value)


def test_a_stage_without_gain_ends_early(tmp_path, monkeypatch):
    rising = iter(range(1, 100))
    monkeypatch.setattr(Validation, "measure", lambda self: (float(next(rising)), 6))
    values = recipe_with(tmp_path, slice(0, 1), patience=2)
    result = train(values, tmp_path / "run", quiet=True)
    assert list(losses_of(tmp_path / "run")) == [0, 2, 4]
    assert (result.stages[0].steps, result.stages[0].best_step) == (4, 0)


def test_a_run_that_crashed_ends_in_the_same_bits(tmp_path, monkeypatch):
    write_rows(tmp_path, 40)
    values = recipe_with(tmp_path, run={"checkpoint_every": 3}, patience=3)
    moments = (("align", 1), ("align", 5), ("instruct", 0), ("instruct", 7))
    assert_crashes_change_nothing(values, tmp_path, monkeypatch, moments)
    bests = [sorted(p.name for p in (tmp_path / run / "checkpoints").glob("*/best-*"))
             for run in ("unbroken", "broken")]  # fmt: skip
    assert bests[0] == bests[1]


def test_other_validation_rows_are_refused_when_a_run_goes_on(tmp_path, monkeypatch):
    values = recipe_with(tmp_path, slice(0, 1), run={"checkpoint_every": 2})
    with monkeypatch.context() as patch:
        crash_at(patch, "align", 3)
        with pytest.raises(StopHereError):
            train(values, tmp_path / "run", quiet=True)
    write_held_out(tmp_path, 5)
    with pytest.raises(TrainingError, match="validation data have changed"):
        train(values, tmp_path / "run", quiet=True)


def test_rows_that_cannot_be_used_are_counted_against_the_budget(tmp_path):
    values = recipe_with(tmp_path, slice(0, 1))
    write_held_out(tmp_path, bad=11)
    with pytest.raises(DataError, match=r"11 of 17 samples .*\n.*no_image_file"):
        train(values, tmp_path / "run", quiet=True)


def test_a_check_says_what_will_be_measured(tmp_path, capsys):
    train(recipe_with(tmp_path), tmp_path / "run", dry_run=True)
    assert "validation  6 rows in stage align, 0 left out; every 2 steps" in capsys.readouterr().out


def test_the_pictures_of_run_ask_come_first(tmp_path):
    values = recipe_with(tmp_path, run={"ask": {"every_steps": 7}})
    assert read_recipe(values)[0].ask.every_steps == 7
    values["run"]["ask"] = None
    assert read_recipe(values)[0].ask.every_steps == 2
    values["validation"]["answers"] = 0
    assert read_recipe(values)[0].ask is None
