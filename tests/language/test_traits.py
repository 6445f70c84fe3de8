"""What tiny models of each family can do, tried out on the model itself."""

from __future__ import annotations

import pytest
import torch

from mmlm.language import traits_of
from tests.language.models import FAMILIES, tiny

ATTENTION = [family for family in FAMILIES if family not in ("mamba", "bloom")]


@pytest.mark.parametrize("family", ATTENTION)
def test_models_with_positions_can_do_it_all(family):
    traits = traits_of(tiny(family))
    assert (traits.packs, traits.packs_by) == (True, "positions")
    assert traits.pads_left
    assert traits.static_cache
    # The sliding windows of these tiny models are shorter than the probe.
    assert traits.crops_cache == (traits.window is None)
    assert set(traits.reasons) == (set() if traits.window is None else {"crops_cache"})


def test_a_window_that_is_long_enough_does_not_hinder_cutting_back():
    from transformers import AutoModelForCausalLM

    config = FAMILIES["mistral"]()
    config.sliding_window = 64
    traits = traits_of(AutoModelForCausalLM.from_config(config))
    assert traits.crops_cache
    assert traits.window == 64


def test_a_state_space_model_lacks_what_it_lacks_and_says_why():
    traits = traits_of(tiny("mamba"))
    assert not traits.packs
    assert not traits.crops_cache
    assert not traits.static_cache
    assert all(traits.why_not(name) for name in ("packs", "crops_cache", "static_cache"))
    assert traits.why_not("pads_left") == ""


def test_a_model_that_ignores_masks_does_not_pad_left():
    model = tiny("llama")
    original = model.forward

    def forward(attention_mask=None, position_ids=None, **kwargs):
        return original(**kwargs)

    model.forward = forward
    traits = traits_of(model)
    assert not traits.pads_left
    assert "logits move by" in traits.why_not("pads_left")
    assert not traits.packs


def test_traits_are_tried_once_for_each_backend(monkeypatch):
    model = tiny("llama").train()
    first = traits_of(model)
    assert model.training
    calls: list[int] = []
    monkeypatch.setattr(model, "forward", lambda **kwargs: calls.append(1))
    assert traits_of(model) is first
    assert calls == []
    monkeypatch.undo()
    model.set_attn_implementation("eager")
    assert traits_of(model) is not first
    assert traits_of(model).packs


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_traits_hold_in_bfloat16(family):
    traits = traits_of(tiny(family).to(torch.bfloat16))
    assert traits.packs
    assert traits.pads_left
