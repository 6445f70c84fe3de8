"""A run goes through its stages, leaves its folder behind, and says what is wrong."""

import json
import shutil

import pytest
import torch
import transformers

from mmlm.errors import ConfigError, DataError, TrainingError
from mmlm.training import train
from mmlm.training.objectives import NextToken
from tests.training.tiny_run import tiny_recipe, write_rows


def log(out, name="log.jsonl"):
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def weights(out, stage="instruct"):
    from safetensors.torch import load_file

    (folder,) = (out / "checkpoints" / stage).glob("step-*")
    return load_file(folder / "weights.safetensors")


def test_a_run_learns_and_leaves_everything_behind(tmp_path):
    recipe = tiny_recipe(tmp_path, ask={"every_steps": 3, "num": 2, "max_new_tokens": 2})
    result = train(recipe, tmp_path / "run", quiet=True)
    out = result.out
    assert [stage.name for stage in result.stages] == ["align", "instruct"]
    assert all(stage.samples == 40 for stage in result.stages)
    assert result.stages[1].last_loss < result.stages[0].first_loss
    for name in ("model/config.json", "result.json", "recipe.resolved.yaml"):
        assert (out / name).is_file(), name
    assert (out / "model" / "recipe.resolved.yaml").is_file()
    steps = log(out)
    assert [row["stage"] for row in steps] == ["align"] * result.stages[0].steps + [
        "instruct"
    ] * result.stages[1].steps
    assert {"loss", "lr", "useful_tokens_per_second", "grad_norm", "padding", "share"} <= set(
        steps[0]
    )
    rounds = log(out, "growth.jsonl")
    assert rounds[0]["step"] == 0
    assert {"image", "question", "truth", "answer"} <= set(rounds[0]["answers"][0])
    assert result.assistant.answer("What is it?", images=[str(tmp_path / "1.png")]) is not None


def test_questions_are_asked_in_as_many_rounds_as_the_recipe_says(tmp_path):
    recipe = tiny_recipe(tmp_path, ask={"rounds": 2, "num": 1, "max_new_tokens": 2})
    result = train(recipe, tmp_path / "run", quiet=True)
    for stage in result.stages:
        asked = [r["step"] for r in log(result.out, "growth.jsonl") if r["stage"] == stage.name]
        assert len(asked) == 3
        assert (asked[0], asked[-1]) == (0, stage.steps)


def test_a_finished_run_is_not_run_again(tmp_path):
    recipe = tiny_recipe(tmp_path)
    first = train(recipe, tmp_path / "run", quiet=True)
    before = (tmp_path / "run" / "log.jsonl").read_bytes()
    again = train(recipe, tmp_path / "run", quiet=True)
    assert again.stages == first.stages
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == before


def test_another_recipe_in_the_same_folder_is_refused_by_line(tmp_path):
    recipe = tiny_recipe(tmp_path)
    train(recipe, tmp_path / "run", quiet=True)
    with pytest.raises(TrainingError, match=r"stages\.align\.peak_lr: 0\.01 -> 0\.5"):
        train(recipe, tmp_path / "run", overrides={"stages.align.peak_lr": 0.5}, quiet=True)
    fresh = train(
        recipe, tmp_path / "run", overrides={"stages.align.peak_lr": 0.5}, fresh=True, quiet=True
    )
    assert fresh.stages[0].steps > 0


def test_the_second_stage_starts_from_the_first(tmp_path):
    recipe = tiny_recipe(tmp_path)
    recipe["stages"][1]["learn"] = {"language.*": 1e-3}
    train(recipe, tmp_path / "run", quiet=True)
    first, second = (weights(tmp_path / "run", name) for name in ("align", "instruct"))
    connector = [name for name in first if "connector" in name]
    assert connector
    assert all(torch.equal(first[name], second[name]) for name in connector)


@pytest.mark.parametrize("precision", ["bf16", "bf16_autocast", "bf16_pure", "fp16"])
def test_low_precision_learns_as_float32_does(tmp_path, precision):
    recipe = tiny_recipe(tmp_path)
    full = train(recipe, tmp_path / "full", quiet=True)
    low = train(recipe, tmp_path / "low", overrides={"run.precision": precision}, quiet=True)
    # The tiny model rounds coarsely; a bug (such as lost updates) leaves the loss where it began.
    assert low.stages[1].last_loss == pytest.approx(full.stages[1].last_loss, abs=0.1)
    assert low.stages[1].last_loss < low.stages[0].first_loss - 0.3


def test_the_feature_cache_changes_nothing_and_encodes_once(tmp_path, monkeypatch):
    from mmlm.modeling.model import MMLMModel

    recipe = tiny_recipe(tmp_path)
    calls = []
    encode = MMLMModel.encode_images

    def counted(self, pixels, *sizes):
        calls.append(len(pixels))
        return encode(self, pixels, *sizes)

    monkeypatch.setattr(MMLMModel, "encode_images", counted)
    train(recipe, tmp_path / "with", quiet=True)
    with_cache = sum(calls)
    calls.clear()
    train(recipe, tmp_path / "without", overrides={"run.feature_cache": "off"}, quiet=True)
    # Twelve pictures, looked at 32 times in each of two stages; saving looks at a few more.
    assert sum(calls) - with_cache == 64 - 12
    one, other = weights(tmp_path / "with"), weights(tmp_path / "without")
    for name, value in one.items():
        # The encoder sees other batches; in float32 that moves the last bits of its features.
        torch.testing.assert_close(value, other[name], rtol=1e-3, atol=1e-5)


def test_a_damaged_feature_is_computed_again(tmp_path):
    recipe = tiny_recipe(tmp_path)
    train(recipe, tmp_path / "first", quiet=True)
    (data,) = (tmp_path / "cache" / "features").glob("*/part-0000.data")
    with data.open("r+b") as file:
        file.seek(100)
        file.write(b"\xff\x00\xff")
    train(recipe, tmp_path / "second", quiet=True)
    one, other = weights(tmp_path / "first"), weights(tmp_path / "second")
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-3, atol=1e-5)


def test_activations_that_are_computed_twice_learn_the_same(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path)
    only = recipe["stages"][1]
    only |= {"learn": ["vision.*", "connector.*", "language.*"], "until": {"steps": 3}}
    recipe["stages"] = [only]
    train(recipe, tmp_path / "once", quiet=True)
    calls, again = [], transformers.modeling_utils.checkpoint
    monkeypatch.setattr(
        transformers.modeling_utils, "checkpoint",
        lambda *args, **words: calls.append(1) or again(*args, **words),
    )  # fmt: skip
    twice = {"run.gradient_checkpointing": True}
    train(recipe, tmp_path / "twice", overrides=twice, quiet=True)
    assert calls
    one, other = weights(tmp_path / "once"), weights(tmp_path / "twice")
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_padded_and_packed_runs_learn_the_same(tmp_path):
    # Padded rows hold samples of like length, so only a step over everything holds the same ones.
    recipe = tiny_recipe(tmp_path, row_tokens=128)
    for stage in recipe["stages"]:
        stage["step_tokens"] = 8192
    train(recipe, tmp_path / "packed", quiet=True)
    train(recipe, tmp_path / "padded", overrides={"run.packing": "padded"}, quiet=True)
    one, other = weights(tmp_path / "packed"), weights(tmp_path / "padded")
    for name, value in one.items():
        # AdamW's first steps turn gradients near zero into full steps: a few weights differ more.
        assert (value - other[name]).abs().mean() < 1e-4, name


def test_broken_rows_are_counted_and_left_out(tmp_path):
    write_rows(tmp_path, 40, bad=3)
    (tmp_path / "0.png").write_bytes((tmp_path / "0.png").read_bytes()[:2000])
    result = train(tiny_recipe(tmp_path), tmp_path / "run", quiet=True)
    rows = log(result.out, "quarantine.jsonl")
    causes = {row["cause"] for row in rows}
    assert causes == {"no_image_file", "bad_image"}
    assert result.stages[0].dropped == 3 + 3
    assert len(rows) == 2 * 6


def test_a_spent_budget_stops_the_run(tmp_path):
    write_rows(tmp_path, 20, bad=30)
    with pytest.raises(DataError, match="drop_budget"):
        train(tiny_recipe(tmp_path), tmp_path / "run", quiet=True)


def test_rows_that_are_all_too_long_are_an_error(tmp_path):
    recipe = tiny_recipe(tmp_path)
    recipe["stages"][0]["step_tokens"] = 16
    with pytest.raises(DataError, match="too_long"):
        train(recipe, tmp_path / "run", quiet=True)


def test_a_row_longer_than_a_step_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"run\.row_tokens"):
        train(tiny_recipe(tmp_path, row_tokens=512), tmp_path / "run", quiet=True)


@pytest.mark.parametrize("choice", ["stop", "skip"])
def test_a_loss_that_is_no_number_never_reaches_the_weights(tmp_path, monkeypatch, choice):
    recipe = tiny_recipe(tmp_path, on_nonfinite=choice)
    true_loss = NextToken.loss
    calls = []

    def loss(self, model, inputs, num_items):
        calls.append(1)
        return true_loss(self, model, inputs, num_items) * (float("nan") if len(calls) == 2 else 1)

    monkeypatch.setattr(NextToken, "loss", loss)
    if choice == "stop":
        with pytest.raises(TrainingError, match="peak_lr"):
            train(recipe, tmp_path / "run", quiet=True)
    else:
        train(recipe, tmp_path / "run", quiet=True)
        assert all(torch.isfinite(value).all() for value in weights(tmp_path / "run").values())
    (saved,) = (tmp_path / "run" / "nonfinite").iterdir()
    assert json.loads((saved / "rank0.json").read_text())["rows"][0]
    assert (saved / "rank0.safetensors").is_file()


@pytest.mark.parametrize("until", [{"steps": 3}, {"samples": 10}, {"tokens": 600}, {"epochs": 0.5}])
def test_a_stage_ends_as_it_says(tmp_path, until):
    recipe = tiny_recipe(tmp_path)
    recipe["stages"] = [{**recipe["stages"][0], "until": until}]
    (stage,) = train(recipe, tmp_path / "run", quiet=True).stages
    reached = {"steps": stage.steps, "samples": stage.samples, "epochs": stage.samples / 40}
    ((word, value),) = until.items()
    if word == "tokens":
        assert 600 <= stage.tokens < 600 + 256
    else:
        assert reached[word] == value


def test_a_stage_can_start_from_any_folder(tmp_path):
    recipe = tiny_recipe(tmp_path)
    first = train(recipe, tmp_path / "first", quiet=True)
    recipe["model"] = {"from": str(first.model)}
    second = train(recipe, tmp_path / "second", quiet=True)
    assert second.stages[0].first_loss < first.stages[0].first_loss


def test_changed_data_stop_a_run_from_going_on(tmp_path):
    recipe = tiny_recipe(tmp_path, checkpoint_every=1)
    train(recipe, tmp_path / "run", quiet=True)
    (tmp_path / "run" / "result.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "instruct")
    state = next((tmp_path / "run" / "checkpoints" / "align").glob("*/state.json"))
    state.write_text(state.read_text().replace('"finished": true', '"finished": false'))
    write_rows(tmp_path, 41)
    with pytest.raises(TrainingError, match="data of stage align have changed"):
        train(recipe, tmp_path / "run", quiet=True)
