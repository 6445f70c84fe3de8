"""A folder that carries its code opens where MMLM is not installed."""

from __future__ import annotations

import json

import pytest

from mmlm import hub
from mmlm.cli.hub import _CLASSES
from mmlm.errors import CheckpointError
from mmlm.hub import remote_code
from tests.hub.stranger import as_a_stranger
from tests.tiny import compose_tiny, picture


def ask(assistant):
    return assistant.answer("What is it?", [picture(3)], max_new_tokens=8)


@pytest.mark.slow
def test_a_stranger_opens_what_no_stock_class_holds(tmp_path):
    assistant = compose_tiny(tmp_path, connector={"use": "perceiver", "tokens": 3, "depth": 1})
    hub.save_mmlm(assistant.model, assistant.processor, tmp_path / "model", with_code=True)
    ((name, processor, answer, piped),) = as_a_stranger([tmp_path / "model"], tmp_path, trust=True)
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
