"""Folders of PEFT: written for the stock class, opened by PEFT itself, read back, merged."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmlm.assistant import load
from mmlm.errors import CheckpointError
from mmlm.hub import export_adapter
from mmlm.language.adapters import adapters, add_adapters
from mmlm.messages import user
from tests.tiny import compose_tiny, picture

peft = pytest.importorskip("peft")
WEIGHTS = "adapter_model.safetensors"


def tuned(folder, kind="lora", **parts):
    """Return an assistant whose connector and adapters have learnt something."""
    assistant = compose_tiny(folder, **parts)
    add_adapters(assistant.model, adapters.read({"use": kind, "rank": 4}, origin="test"))
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in assistant.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
            if "connector" in name:
                parameter.mul_(1.5)
    assistant.model.eval()
    return assistant


def logits(model, processor):
    encoded = processor.encode_chat([user("What?", [picture(3)])], add_generation_prompt=True)
    with torch.no_grad():
        return model(
            input_ids=torch.tensor([encoded.ids]), pixel_values=encoded.pixel_values
        ).logits


@pytest.fixture(scope="module", params=["lora", "dora"])
def exported(request, tmp_path_factory):
    place = tmp_path_factory.mktemp(request.param)
    assistant = tuned(place, request.param)
    wanted = logits(assistant.model, assistant.processor)
    export_adapter(assistant.model, assistant.processor, place / "out")
    return place / "out", wanted


def test_peft_opens_it_on_the_stock_class(exported):
    from transformers import AutoModelForImageTextToText

    folder, wanted = exported
    stock = AutoModelForImageTextToText.from_pretrained(folder / "base", dtype=torch.float32)
    opened = peft.PeftModel.from_pretrained(stock, folder).eval()
    processor = load(folder / "base", device="cpu").processor
    torch.testing.assert_close(logits(opened, processor), wanted, rtol=0, atol=1e-5)


def test_the_connector_travels_in_modules_to_save(exported):
    folder, _ = exported
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["modules_to_save"] == ["model.multi_modal_projector"]
    assert settings["base_model_name_or_path"] == "base"
    key = "base_model.model.model.multi_modal_projector.linear_1.weight"
    assert key in load_file(folder / WEIGHTS)


def test_it_is_read_with_its_base_and_merged(exported):
    folder, wanted = exported
    again = load(folder, device="cpu")
    assert not [name for name in again.model.state_dict() if "lora_" in name]
    torch.testing.assert_close(logits(again.model, again.processor), wanted, rtol=0, atol=1e-4)
    assert again.save(folder.parent / "merged") == []


def test_an_adapter_of_our_own_class_is_read(tmp_path):
    parts = {"connector": {"use": "perceiver", "tokens": 4, "heads": 4, "depth": 1}}
    assistant = tuned(tmp_path, **parts)
    wanted = logits(assistant.model, assistant.processor)
    export_adapter(assistant.model, assistant.processor, tmp_path / "out")
    again = load(tmp_path / "out", device="cpu")
    torch.testing.assert_close(logits(again.model, again.processor), wanted, rtol=0, atol=1e-4)


def copied(exported, tmp_path, change=None, **settings):
    """Return a copy of the folder with other tensors or settings."""
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(exported[0], folder)
    state = load_file(folder / WEIGHTS)
    if change is not None:
        change(state)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


Q = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
DAMAGE = {
    "a stranger": (
        lambda s: s.update({"base_model.model.model.stranger.weight": torch.ones(2)}),
        {},
        r"have no place.*stranger",
    ),
    "a layer too deep": (
        lambda s: s.update({Q.replace("layers.0", "layers.9") + ".lora_A.weight": torch.ones(2)}),
        {},
        r"layers that this base does not have.*layers\.9",
    ),
    "another width": (
        lambda s: s.update({f"{Q}.lora_A.weight": torch.ones(4, 9)}),
        {},
        r"q_proj\.lora_A\.weight has the shape \(4, 9\)",
    ),
    "half an adapter": (lambda s: s.pop(f"{Q}.lora_B.weight"), {}, r"lacks 1 matrices"),
    "no base": (None, {"base_model_name_or_path": None}, "names no base"),
    "another method": (None, {"peft_type": "PREFIX_TUNING"}, "adapter_config|PREFIX_TUNING"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_does_not_fit_the_base_is_listed(exported, tmp_path, name):
    change, settings, said = DAMAGE[name]
    with pytest.raises(CheckpointError, match=said):
        load(copied(exported, tmp_path, change, **settings), device="cpu")


def test_pickled_adapters_are_not_opened(exported, tmp_path):
    folder = copied(exported, tmp_path)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin, which is pickled"):
        load(folder, device="cpu")


def test_a_model_without_adapters_has_none_to_export(tmp_path):
    assistant = compose_tiny(tmp_path)
    with pytest.raises(CheckpointError, match="carries no adapters"):
        export_adapter(assistant.model, assistant.processor, tmp_path / "out")
