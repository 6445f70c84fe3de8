"""Adapters learn in place of the weights below them, resume, and merge into a stock folder."""

import json

import pytest
import torch
from safetensors.torch import load_file

import mmlm
from mmlm.training import train
from tests.training.tiny_run import tiny_recipe

pytest.importorskip("peft", reason="needs the extra [train]")
KINDS = ["lora", "dora"]


def lora_recipe(folder, *, use="lora", **run):
    """Return a recipe of two stages, of which the second learns adapters."""
    recipe = tiny_recipe(folder, **run)
    recipe["stages"][1] |= {
        "name": "lora",
        "learn": {"connector.*": 1e-3, "language.*": 1e-2},
        "adapters": {"use": use, "rank": 4},
    }
    return recipe


def weights(out, stage):
    (folder,) = (out / "checkpoints" / stage).glob("step-*")
    return load_file(folder / "weights.safetensors")


def logits(assistant):
    ids = torch.arange(20).unsqueeze(0)
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ids[0, 1:17] = assistant.model.config.image_token_id
    with torch.no_grad():
        return assistant.model(input_ids=ids, pixel_values=pixels).logits.float()


@pytest.mark.parametrize("use", KINDS)
def test_adapters_learn_and_the_weights_below_them_do_not(tmp_path, use):
    result = train(lora_recipe(tmp_path, use=use), tmp_path / "run", quiet=True)
    names = weights(tmp_path / "run", "lora")
    language = [name for name in names if "language" in name]
    assert language
    assert all("lora_" in name for name in language)
    assert result.stages[1].last_loss < result.stages[0].first_loss
    config = json.loads((result.model / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_delta_keeps_the_adapters_and_the_model_has_them_merged(tmp_path, precision):
    result = train(lora_recipe(tmp_path, precision=precision), tmp_path / "run", quiet=True)
    delta = load_file(result.delta / "delta.safetensors")
    assert all("lora_" in name or ".connector." in name for name in delta)
    merged, beside = logits(mmlm.load(result.model)), logits(mmlm.load(result.delta))
    # Merging rounds each weight once: 4e-7 in float32, a few thousandths of bfloat16's 8 bits.
    limit = 1e-5 if precision == "fp32" else 2e-2
    difference = (merged - beside).abs().max() / merged.abs().max()
    assert difference < limit
