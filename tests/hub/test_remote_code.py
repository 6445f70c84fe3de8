"""A folder that carries its code opens where MMLM is not installed."""

from __future__ import annotations

import json

import pytest

from mmlm import hub
from mmlm.cli.hub import _CLASSES
from mmlm.errors import CheckpointError
from mmlm.hub import remote_code
from tests.hub.stranger import as_a_stranger
from tests.tiny import compose_tiny, picture, save_vision


def ask(assistant):
    return assistant.answer("What is it?", [picture(3)], max_new_tokens=8)


@pytest.mark.slow
def test_a_stranger_opens_what_no_stock_class_holds(tmp_path):
    """One connector of each form: before the language model, and inside its layers."""
    perceiver = {"use": "perceiver", "tokens": 3, "depth": 1}
    made = {
        "perceiver": compose_tiny(tmp_path / "a", connector=perceiver),
        "deepstack": compose_tiny(
            tmp_path / "b",
            connector={"use": "deepstack", "layers": 2, "start": 0},
            eye={
                "use": "hf", "layer": -2, "layers": [1, 2],
                "checkpoint": str(save_vision(tmp_path / "eye", "clip")),
            },
        ),
    }  # fmt: skip
    for name, assistant in made.items():
        folder = tmp_path / "saved" / name
        hub.save_mmlm(assistant.model, assistant.processor, folder, with_code=True)
    heard = as_a_stranger([tmp_path / "saved" / name for name in made], tmp_path, trust=True)
    for assistant, (name, processor, answer, piped) in zip(made.values(), heard, strict=True):
        assert (name, processor) == ("MMLMForConditionalGeneration", "MMLMProcessor")
        assert answer == piped
        assert answer.strip() == ask(assistant)


def test_the_code_is_what_model_and_processor_need_and_no_more():
    names = set(remote_code.modules())
    assert {"mmlm.modeling.model", "mmlm.connectors.perceiver", "mmlm.processing"} <= names
    rooms = {name.split(".")[1] for name in names}
    assert not rooms & {"training", "evaluation", "serving", "cli", "hub", "data", "generation"}
    text = remote_code.bundle()
    compile(text, remote_code.FILE, "exec")
    assert "from mmlm." not in text


def test_a_stock_folder_needs_no_code(tmp_path):
    compose_tiny(tmp_path).save(tmp_path / "model")
    with pytest.raises(CheckpointError, match="needs no code beside it"):
        remote_code.add_code(tmp_path / "model")
    assert "auto_map" not in json.loads((tmp_path / "model/config.json").read_text())


def test_every_stock_class_can_be_named_at_the_command_line():
    assert sorted(_CLASSES) == sorted(hub.stock_classes)
