"""A delta holds what was learnt and names its base parts."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from safetensors import safe_open

from mmlm.assistant import compose, load
from mmlm.errors import CheckpointError
from tests.tiny import compose_tiny, picture, save_language, save_vision


def ask(assistant):
    return assistant.answer("What is it?", [picture(3)], max_new_tokens=8)


def keys_of(folder):
    with safe_open(folder / "delta.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("language", ["llama", "smollm"])
def test_a_delta_holds_what_differs_and_nothing_else(tmp_path, language):
    assistant = compose_tiny(tmp_path, language=language)
    with torch.no_grad():
        assistant.model.model.language.layers[0].mlp.up_proj.weight.add_(0.1)
    assert assistant.save(tmp_path / "delta", delta=True) == []
    connector = {
        f"model.connector.layers.{n}.{kind}" for n in (0, 2) for kind in ("bias", "weight")
    }
    assert keys_of(tmp_path / "delta") == connector | {"model.language.layers.0.mlp.up_proj.weight"}
    assert ask(load(tmp_path / "delta", device="cpu")) == ask(assistant)


def test_adapters_travel_as_adapters(tmp_path):
    from peft import LoraConfig

    assistant = compose_tiny(tmp_path, language="qwen2")
    before = ask(assistant)
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    assistant.model.add_adapter(lora)
    assistant.save(tmp_path / "delta", delta=True)
    keys = keys_of(tmp_path / "delta")
    assert all("lora_" in key or key.startswith("model.connector.") for key in keys)
    again = load(tmp_path / "delta", device="cpu")
    assert ask(again) == ask(assistant) != before
    with pytest.raises(CheckpointError, match=r"adapters that are not merged.*delta=True"):
        assistant.save(tmp_path / "whole")


def test_base_parts_in_a_package_are_named_by_package_and_not_by_place(tmp_path, monkeypatch):
    package = tmp_path / "site" / "tiny_parts"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    save_language(package / "words")
    save_vision(package / "eye")
    monkeypatch.syspath_prepend(str(package.parent))
    assistant = compose(
        vision={"use": "hf", "checkpoint": "package:tiny_parts/eye"},
        language={"use": "causal_lm", "checkpoint": "package:tiny_parts/words"},
    )
    assistant.save(tmp_path / "delta", delta=True)
    bases = json.loads((tmp_path / "delta" / "delta.json").read_text())["bases"]
    assert bases["language"]["source"]["checkpoint"] == "package:tiny_parts/words"
    shutil.move(tmp_path / "delta", tmp_path / "elsewhere")
    assert ask(load(tmp_path / "elsewhere", device="cpu")) == ask(assistant)
    sys.modules.pop("tiny_parts", None)


def test_a_delta_can_be_moved_together_with_its_base(tmp_path):
    assistant = compose_tiny(tmp_path / "one")
    assistant.save(tmp_path / "one" / "delta", delta=True)
    shutil.move(tmp_path / "one", tmp_path / "two")
    assert ask(load(tmp_path / "two" / "delta", device="cpu")) == ask(assistant)


def test_an_untrained_encoder_is_stored_whole_and_said(tmp_path):
    eye = {"use": "timm", "checkpoint": "test_efficientnet", "pretrained": False, "side_px": 64}
    assistant = compose_tiny(tmp_path, eye=eye | {"feature": "final"})
    reasons = assistant.save(tmp_path / "delta", delta=True)
    assert reasons == ["the vision part has no name from which it could be loaded again"]
    assert any(key.startswith("model.vision.tower.") for key in keys_of(tmp_path / "delta"))
    shutil.rmtree(tmp_path / "llama" / "nothing", ignore_errors=True)
    assert ask(load(tmp_path / "delta", device="cpu")) == ask(assistant)


def test_a_loaded_delta_is_saved_as_a_stock_class_and_as_a_delta_again(tmp_path):
    assistant = compose_tiny(tmp_path)
    assistant.save(tmp_path / "delta", delta=True)
    again = load(tmp_path / "delta", device="cpu")
    assert again.save(tmp_path / "model") == []
    assert again.save(tmp_path / "second", delta=True) == []
    assert keys_of(tmp_path / "second") == keys_of(tmp_path / "delta")
    assert ask(load(tmp_path / "model", device="cpu")) == ask(assistant)
