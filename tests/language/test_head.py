"""What stands between hidden states and logits, for every family."""

from __future__ import annotations

import pytest
import torch

from mmlm.errors import ConfigError
from mmlm.language import HeadRule, decoder_of, head_of, head_rule_of
from tests.language.models import FAMILIES, tiny

RULES = {
    "gemma2": HeadRule(softcap=0.3),
    "cohere": HeadRule(scale=0.25),
    "granite": HeadRule(scale=1 / 3),
    "phi": HeadRule(bias=True),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rule_of_every_family_is_found(family):
    assert head_rule_of(tiny(family)) == RULES.get(family, HeadRule())


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "phi"])
def test_the_rule_is_found_in_bfloat16(family):
    assert head_rule_of(tiny(family).bfloat16()) == RULES.get(family, HeadRule())


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_head_and_rule_together_give_the_logits(family):
    model = tiny(family)
    ids = torch.randint(80, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden = decoder_of(model)(input_ids=ids).last_hidden_state
        logits = head_rule_of(model).apply(head_of(model)(hidden))
        # The same operations in the same order: equal to the last bit, but for Granite, which
        # divides by 3 where the rule multiplies by a third (1.2e-7 was seen).
        close = {"rtol": 3e-7, "atol": 3e-7} if family == "granite" else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(logits, model(input_ids=ids).logits, **close)


def test_an_unnamed_factor_is_measured():
    model = tiny("llama")
    model.forward = _changed(model.forward, lambda logits: logits * 1.75)
    assert head_rule_of(model).scale == pytest.approx(1.75, rel=1e-5)


def test_an_unknown_rule_is_refused_with_its_distance():
    model = tiny("llama")
    model.forward = _changed(model.forward, lambda logits: logits + 0.3 * logits.abs())
    with pytest.raises(ConfigError, match=r"does not know: the nearest rule .* is off by"):
        head_rule_of(model)


def test_a_model_that_treats_embedded_tokens_otherwise_is_refused():
    model = tiny("llama")
    layer = model.model
    original = layer.forward

    def forward(input_ids=None, inputs_embeds=None, **kwargs):
        if inputs_embeds is None:
            inputs_embeds = layer.embed_tokens(input_ids) * 2.0
        return original(inputs_embeds=inputs_embeds, **kwargs)

    layer.forward = forward
    with pytest.raises(ConfigError, match="other logits for embedded tokens than for their ids"):
        head_rule_of(model)


def test_the_probe_leaves_the_training_mode_alone():
    model = tiny("llama").train()
    head_rule_of(model)
    assert model.training


@pytest.mark.parametrize("rule", [HeadRule(), HeadRule(scale=0.25, softcap=30.0, bias=True)])
def test_a_rule_survives_json(rule):
    assert HeadRule.from_dict(rule.to_dict()) == rule
    assert rule.is_plain == (rule == HeadRule())


def _changed(forward, change):
    def wrapped(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = change(output.logits)
        return output

    return wrapped
