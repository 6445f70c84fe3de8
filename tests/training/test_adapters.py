"""Adapters learn in place of the weights below them, resume, and merge into a stock folder."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mmlm
from mmlm.errors import ConfigError, MissingExtraError, TrainingError
from mmlm.language import adapters as kinds
from mmlm.language.four_bits import quantise
from mmlm.training import train
from mmlm.training.preflight import check
from mmlm.training.recipe import Recipe
from mmlm.training.stage import StageRun
from mmlm.training.trainer import Trainer
from tests import tiny
from tests.training.launching import group, launch
from tests.training.test_resume import assert_crashes_change_nothing, assert_same_bits
from tests.training.tiny_run import tiny_recipe

pytest.importorskip("peft", reason="needs the extra [train]")
ROOT = Path(__file__).parents[2]
HAS_QLORA = importlib.util.find_spec("bitsandbytes") is not None
KINDS = ["lora", "dora", pytest.param("qlora", marks=pytest.mark.skipif(
    not HAS_QLORA, reason="needs bitsandbytes"))]  # fmt: skip


def lora_recipe(folder, *, use="lora", then_full=False, **run):
    """Return a recipe of two stages: alignment and adapters, or adapters and then all weights."""
    recipe = tiny_recipe(folder, **run)
    align, instruct = recipe["stages"]
    lora = {
        **instruct,
        "name": "lora",
        "learn": {"connector.*": 1e-3, "language.*": 1e-2},
        "adapters": {"use": use, "rank": 4, "dropout": 0.1},
    }
    recipe["stages"] = [lora, instruct] if then_full else [align, lora]
    return recipe


def weights(out, stage):
    (folder,) = (out / "checkpoints" / stage).glob("step-*")
    return load_file(folder / "weights.safetensors")


def logits(assistant):
    ids = torch.arange(20).unsqueeze(0)
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ids[0, 1:17] = assistant.model.config.image_token_id
    pixels = pixels.to(assistant.model.dtype)
    with torch.no_grad():
        return assistant.model(input_ids=ids, pixel_values=pixels).logits.float()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("use", KINDS)
def test_adapters_learn_and_are_merged_in_the_model_and_apart_in_the_delta(
    tmp_path, use, precision
):
    recipe = lora_recipe(tmp_path, use=use, precision=precision)
    result = train(recipe, tmp_path / "run", quiet=True)
    assert result.stages[1].last_loss < result.stages[0].first_loss
    learnt = [name for name in weights(tmp_path / "run", "lora") if "language" in name]
    assert learnt
    assert all("lora_" in name for name in learnt)
    config = json.loads((result.model / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    delta = load_file(result.delta / "delta.safetensors")
    assert all("lora_" in name or ".connector." in name for name in delta)
    merged, beside = logits(mmlm.load(result.model)), logits(mmlm.load(result.delta))
    # Merging rounds each weight once. bfloat16 keeps 8 bits of it, and the 4-bit kernel of a CPU
    # computes in bfloat16 whatever stands around it. Without its adapters it moves by over 0.1.
    limit = 1e-5 if precision == "fp32" and use != "qlora" else 3e-2
    assert (merged - beside).abs().max() / merged.abs().max() < limit


def test_adapters_by_token_learn_and_the_folder_keeps_them_beside_its_base(tmp_path, capsys):
    recipe = lora_recipe(tmp_path, use="mm_lora", precision="fp32")
    recipe["stages"][1]["adapters"]["image_rank"] = 2
    check(Trainer(Recipe.from_dict(recipe), tmp_path, tmp_path / "check"))
    assert "opens in    MMLM alone, with the base parts in reach" in capsys.readouterr().out
    result = train(recipe, tmp_path / "run", quiet=True)
    assert result.stages[1].last_loss < result.stages[0].first_loss
    assert "chosen token by token" in result.stock_reasons[0]
    learnt = load_file(result.model / "delta.safetensors")
    ranks = {name.split(".")[-2]: len(value) for name, value in learnt.items() if "lora_A" in name}
    assert ranks == {"default": 4, "image": 2}
    # In the last layer nothing but keys and values of images reaches a word that is learnt.
    first = {name: value for name, value in learnt.items() if ".layers.0." in name}
    assert all(value.abs().max() > 0 for name, value in first.items() if "lora_B" in name)
    names = weights(tmp_path / "run", "lora")
    assert {"default", "image"} == {name.split(".")[-2] for name in names if "lora_" in name}
    mmlm.load(tmp_path / "run")


@pytest.mark.slow
def test_a_stage_after_adapters_by_token_must_have_the_same(tmp_path):
    recipe = lora_recipe(tmp_path, use="mm_lora", then_full=True)
    with pytest.raises(TrainingError, match=r"cannot be merged.*give it the same ones"):
        train(recipe, tmp_path / "run", quiet=True)


def test_a_later_stage_without_adapters_learns_the_merged_weights(tmp_path):
    recipe = lora_recipe(tmp_path, then_full=True)
    recipe["stages"][1]["learn"] = ["connector.*"]
    result = train(recipe, tmp_path / "run", quiet=True)
    names = weights(tmp_path / "run", "instruct")
    assert not any("lora_" in name for name in names)
    assert any(name.endswith("q_proj.weight") for name in names)
    assert result.stages[1].last_loss < result.stages[0].first_loss - 0.3


def test_a_later_stage_with_the_same_words_goes_on_with_the_adapters(tmp_path):
    recipe = lora_recipe(tmp_path, then_full=True)
    lora, more = recipe["stages"]
    more |= {"learn": ["adapters.*"], "peak_lr": 1e-3}
    more["adapters"] = {"alpha": None, **lora["adapters"]}
    train(recipe, tmp_path / "run", quiet=True)
    first, second = (weights(tmp_path / "run", name) for name in ("lora", "instruct"))
    assert first.keys() == second.keys()
    moved = {name for name in first if not torch.equal(first[name], second[name])}
    assert moved == {name for name in first if "lora_" in name}


@pytest.mark.parametrize("use", KINDS)
@pytest.mark.parametrize("then_full", [False, True], ids=["adapters last", "all weights after"])
def test_a_crashed_run_with_adapters_ends_in_the_same_bits(tmp_path, monkeypatch, use, then_full):
    recipe = lora_recipe(
        tmp_path, use=use, then_full=then_full, checkpoint_every=3, precision="bf16",
        ask={"every_steps": 3, "num": 1, "max_new_tokens": 2},
    )  # fmt: skip
    first, second = (stage["name"] for stage in recipe["stages"])
    moments = ((first, 4), (second, 0), (second, 5))
    assert_crashes_change_nothing(recipe, tmp_path, monkeypatch, moments)


@pytest.mark.slow
def test_a_run_with_adapters_that_is_killed_ends_in_the_same_bits(tmp_path):
    recipe = lora_recipe(tmp_path, then_full=True, checkpoint_every=2)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.kill_often", str(tmp_path / "recipe.json"),
         str(tmp_path), os.environ.get("MMLM_TEST_KILLS", "2")],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "finished 0" in done.stdout.split("\n"), done.stdout
    assert f"killed {signal.SIGKILL}" in done.stdout, "no child was killed while it ran"
    assert_same_bits(tmp_path / "unbroken", tmp_path / "killed")


@pytest.mark.slow
def test_two_processes_learn_the_adapters_that_one_learns(tmp_path):
    recipe = lora_recipe(tmp_path, row_tokens=100)
    recipe["stages"] = recipe["stages"][1:]
    del recipe["stages"][0]["adapters"]["dropout"]  # which each process draws for itself
    train(recipe, tmp_path / "one", quiet=True)
    launch(group((recipe, tmp_path / "two", {}, None)))
    one, two = weights(tmp_path / "one", "lora"), weights(tmp_path / "two", "lora")
    assert one.keys() == two.keys()
    assert any("lora_" in name for name in one)
    for name, value in one.items():
        assert (value - two[name]).abs().mean() < 1e-4, name
    assert (tmp_path / "two" / "model" / "config.json").is_file()


def test_dropout_of_adapters_drops_while_they_learn_and_not_in_the_encoder(tmp_path, monkeypatch):
    recipe = lora_recipe(tmp_path)
    modes = {}
    go = StageRun.go

    def look(self):
        if self.stage.name == "lora":
            modes.update({name: module.training for name, module in self.model.named_modules()})
        return go(self)

    monkeypatch.setattr(StageRun, "go", look)
    train(recipe, tmp_path / "run", quiet=True)
    drops = [mode for name, mode in modes.items() if name.endswith("lora_dropout.default")]
    assert drops
    assert all(drops)
    assert not any(mode for name, mode in modes.items() if name.startswith("model.vision"))


def test_words_are_matched_before_adapters_learn(tmp_path):
    recipe = lora_recipe(tmp_path)
    recipe["stages"][0]["objective"] = {"use": "word_match"}
    result = train(recipe, tmp_path / "run", quiet=True)
    assert result.stages[1].last_loss < result.stages[1].first_loss


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ({"use": "lroa"}, "Did you mean 'lora'"),
        ({"use": "lora", "rnak": 4}, r"stages\.lora\.adapters.*\n.*rnak: no such key"),
        ({"use": "lora", "targets": ["qkv"]}, r"stages\.lora: .*targets names 'qkv'.*q_proj"),
    ],
)  # fmt: skip
def test_wrong_words_are_refused_before_the_first_stage(tmp_path, words, complaint):
    recipe = lora_recipe(tmp_path)
    recipe["stages"][1]["adapters"] = words
    with pytest.raises(ConfigError, match=complaint):
        train(recipe, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("learn", "complaint"),
    [
        (["connector.*"], r"stages\.lora: The stage has adapters, and `learn` .*adapters\.\*"),
        (["adapters.language.layers.9.*"], "matches no parameter"),
        (["adapters.*", "language.layers.0.mlp.up_proj.weight"], "has an adapter stands still"),
    ],
)
def test_patterns_that_miss_the_adapters_are_refused_before_the_first_stage(
    tmp_path, learn, complaint
):
    recipe = lora_recipe(tmp_path)
    recipe["stages"][1]["learn"] = learn
    with pytest.raises(ConfigError, match=complaint):
        train(recipe, tmp_path / "run", quiet=True)


def test_qlora_without_its_package_is_refused_before_the_first_stage(tmp_path, monkeypatch):
    recipe = lora_recipe(tmp_path, use="qlora")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtraError, match=r"adapters: qlora needs .*mmlm\[qlora\]"):
        train(recipe, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.skipif(not HAS_QLORA, reason="needs bitsandbytes")
def test_a_model_that_is_quantised_already_takes_no_adapters(tmp_path):
    model = tiny.compose_tiny(tmp_path).model
    quantise(model, ["model.language.layers.0.self_attn.q_proj"])
    with pytest.raises(ConfigError, match=r"q_proj is a Linear4bit.*quantised already"):
        kinds.add_adapters(model, kinds.LoraAdapterConfig())
