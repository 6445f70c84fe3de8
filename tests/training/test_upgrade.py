"""Another encoder or language model under a trained connector: what fits is kept, and said."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, SiglipVisionConfig

from mmlm.assistant import load
from mmlm.config import read_yaml
from mmlm.errors import ConfigError
from mmlm.hub import upgrade
from mmlm.recipes import find_recipe
from mmlm.training import train
from mmlm.training.recipe import read_recipe
from tests.tiny import VISION, compose_tiny, picture, save_language, save_vision
from tests.training.tiny_run import tiny_recipe

RESAMPLER = {"use": "perceiver", "tokens": 4, "heads": 4, "depth": 1}


def wide_eye(folder):
    """Write a SigLIP of another width than that of the other tiny encoders."""
    torch.manual_seed(11)
    values = {**VISION, "hidden_size": 48, "num_attention_heads": 4}
    AutoModel.from_config(SiglipVisionConfig(**values)).save_pretrained(folder)
    return {"use": "hf", "checkpoint": str(folder), "layer": -2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a saved assistant whose weights are nobody's initial ones."""
    place = tmp_path_factory.mktemp("trained")
    assistant = compose_tiny(place)
    with torch.no_grad():
        for parameter in assistant.model.parameters():
            parameter.mul_(1.25)
    assistant.save(place / "old")
    return place / "old", assistant


def test_a_new_encoder_keeps_the_language_model_and_what_fits_of_the_connector(trained, tmp_path):
    folder, old = trained
    model, processor, kept = upgrade(folder, {"vision": wide_eye(tmp_path / "eye")})
    assert model.config.facts.width == 48
    assert kept == [
        f"vision: new ({tmp_path / 'eye'})",
        "language: kept with what it has learnt",
        "connector: 3 of 4 tensors kept; new: layers.0.weight",
    ]
    ours, theirs = model.state_dict(), old.model.state_dict()
    for key in ours:
        if key.startswith(("model.language.", "lm_head.")) or "connector.layers.2" in key:
            assert torch.equal(ours[key], theirs[key]), key
    assert processor.chat.template == old.processor.chat.template


def test_an_encoder_of_the_same_shape_keeps_the_whole_connector(trained, tmp_path):
    folder, _ = trained
    eye = {"use": "hf", "checkpoint": str(save_vision(tmp_path / "s", "siglip", 5)), "layer": -2}
    kept = upgrade(folder, {"vision": eye}).kept
    assert kept[-1] == "connector: 4 of 4 tensors kept"


def test_a_new_language_model_keeps_the_encoder(tmp_path):
    old = compose_tiny(tmp_path, connector=RESAMPLER)
    with torch.no_grad():
        for parameter in old.model.parameters():
            parameter.mul_(1.25)
    old.save(tmp_path / "old")
    words = {"use": "causal_lm", "checkpoint": str(save_language(tmp_path / "q", "qwen2", 3))}
    model, processor, kept = upgrade(tmp_path / "old", {"language": words})
    assert model.config.text_config.model_type == "qwen2"
    assert kept[0] == "vision: kept with what it has learnt"
    for key, value in model.model.vision.state_dict().items():
        assert torch.equal(value, old.model.model.vision.state_dict()[key])
    joined = type(old)(model, processor)
    joined.save(tmp_path / "new")
    asked = ("What is it?", [picture(3)])
    again = load(tmp_path / "new", device="cpu").answer(*asked, max_new_tokens=4)
    assert joined.answer(*asked, max_new_tokens=4) == again


def test_what_cannot_be_exchanged_is_refused(trained):
    with pytest.raises(ConfigError, match=r"model\.video cannot be exchanged"):
        upgrade(trained[0], {"video": {"use": "frames"}})


def test_training_says_what_was_kept_and_brings_the_old_space_back(trained, tmp_path, capsys):
    folder, old = trained
    recipe = tiny_recipe(tmp_path)
    recipe["model"] = {"from": str(folder), "vision": wide_eye(tmp_path / "eye")}
    recipe["stages"] = [
        {"name": "old_space", "learn": ["connector.*"], "data": str(tmp_path / "rows.jsonl"),
         "until": {"epochs": 4}, "step_tokens": 256, "peak_lr": 1e-2,
         "objective": {"use": "old_space", "checkpoint": str(folder)}},
    ]  # fmt: skip
    recipe["run"] |= {"feature_cache": "off"}
    result = train(recipe, tmp_path / "run")
    stage = result.stages[0]
    assert stage.last_loss < 0.8 * stage.first_loss
    assert "connector: 3 of 4 tensors kept" in capsys.readouterr().out
    new = load(tmp_path / "run", device="cpu").model.state_dict()
    head = old.model.state_dict()["lm_head.weight"]
    assert torch.equal(new["lm_head.weight"], head)


@pytest.mark.parametrize("name", ["new_encoder", "new_language"])
def test_the_recipes_exchange_one_part(name):
    recipe = read_recipe(name)[0]
    assert recipe.model["from"] == "runs/llava_two_stage"
    assert len(set(recipe.model) - {"from"}) == 1
    values = read_yaml(find_recipe("train", name))
    assert values["stages"][0]["learn"] == ["connector.*"]
