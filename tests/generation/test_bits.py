"""A language model in 4 or 8 bits answers, from less memory."""

from __future__ import annotations

import sys

import pytest
import torch

from mmlm.errors import ConfigError, MissingExtraError
from mmlm.generation import GenerationSettings
from mmlm.generation.bits import hold_in_bits
from mmlm.generation.session import Sessions
from mmlm.messages import user
from tests.tiny import compose_tiny, picture


def num_bytes(model):
    return sum(t.numel() * t.element_size() for t in model.model.language.layers.parameters())


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_in_fewer_bits_answers_and_is_near_to_the_whole_one(tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    tiny = compose_tiny(tmp_path)
    ids = torch.tensor([tiny.processor.encode_chat([user("What?")]).ids])
    with torch.inference_mode():
        whole = tiny.model(input_ids=ids).logits.float()
    before = num_bytes(tiny.model)
    assert hold_in_bits(tiny.model, bits) == 14  # seven in each of two layers
    # 4 bits and a scale for every 64 weights, or 8 bits and a scale for every row.
    assert num_bytes(tiny.model) < before * (0.3 if bits == 4 else 0.4)
    with torch.inference_mode():
        packed = tiny.model(input_ids=ids).logits.float()
    near = torch.nn.functional.cosine_similarity(whole.flatten(), packed.flatten(), dim=0)
    assert near > (0.9 if bits == 4 else 0.99)
    sessions = Sessions(tiny.model, tiny.processor)
    settings = GenerationSettings(max_new_tokens=6)
    talk = [user("What?", [picture(1)])]
    assert sessions.answer(talk, settings)[1].num_tokens > 0


def test_other_numbers_of_bits_and_a_missing_package_are_named(tmp_path, monkeypatch):
    tiny = compose_tiny(tmp_path)
    with pytest.raises(ConfigError, match="4 or 8"):
        hold_in_bits(tiny.model, 3)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtraError, match=r"mmlm\[qlora\]"):
        hold_in_bits(tiny.model, 4)
