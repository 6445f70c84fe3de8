"""Adapters beside the language model: where they are, what learns, what merging and saving keep."""

from __future__ import annotations

import builtins
import importlib.util

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mmlm.errors import CheckpointError, ConfigError, MissingExtraError
from mmlm.language.adapters import (
    adapters,
    adapters_off,
    add_adapters,
    linear_layers,
    merge_adapters,
    save_adapters,
)
from tests.language.models import tiny

KINDS = ["lora", "dora"]
if importlib.util.find_spec("bitsandbytes") is not None:
    KINDS.append("qlora")
IDS = torch.tensor([[3, 5, 7, 9, 11, 13]])


class Inner(nn.Module):
    """Parts of the joined model, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.Linear(8, 8)
        self.connector = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 64))
        causal = causal_lm()
        self.language = causal.model
        self.head = causal.lm_head


class Joined(PreTrainedModel):
    """A stand-in for the joined model: the same part names, no pictures."""

    config_class = LlamaConfig
    _supports_sdpa = True

    def __init__(self, config=None) -> None:
        super().__init__(config or causal_lm().config)
        torch.manual_seed(0)
        self.model = Inner()
        self.lm_head = self.model.head
        del self.model.head

    def get_input_embeddings(self):
        return self.model.language.get_input_embeddings()

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, use_cache=False):
        hidden = self.model.language(input_ids=input_ids, use_cache=False).last_hidden_state
        picture = torch.ones(8, dtype=self.model.vision.weight.dtype)
        hidden = hidden + self.model.connector(self.model.vision(picture))
        output = type("Output", (), {})()
        output.logits = self.lm_head(hidden)
        return output


def causal_lm() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=80,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def adapter(kind: str, **settings):
    return adapters.read({"use": kind, **settings}, origin="adapters")


def shake(model) -> None:
    """Give the adapters something to add; they begin by adding nothing."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_stand_beside_all_linear_layers_of_the_language_part_alone(kind):
    model = Joined()
    names = add_adapters(model, adapter(kind, rank=4))
    assert len(names) == 2 * 7
    assert all(name.startswith("model.language.layers.") for name in names)
    with_adapter = {n.split(".lora_A")[0] for n, _ in model.named_parameters() if "lora_A" in n}
    assert with_adapter == set(names)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_nothing(kind):
    model = Joined().eval()
    before = logits(model)
    add_adapters(model, adapter(kind, rank=4))
    # NF4 rounds the weights; LoRA adds zero, and DoRA divides a weight by its own length.
    atol = {"lora": 0, "dora": 1e-6, "qlora": 0.2}[kind]
    torch.testing.assert_close(logits(model), before, rtol=0, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_adapters_learn_where_a_weight_has_one(kind):
    model = Joined()
    model.model.vision.requires_grad_(False)
    add_adapters(model, adapter(kind, rank=4))
    shake(model)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any("base_layer" in name for name in learning)
    assert not any("vision" in name for name in learning)
    assert sum("connector" in name for name in learning) == 4
    assert any("norm" in name for name in learning)  # has no adapter: what it was
    model(input_ids=IDS).logits.square().sum().backward()
    parameters = dict(model.named_parameters())
    idle = [name for name in learning if parameters[name].grad is None]
    assert idle == []
    assert all(p.dtype == torch.float32 for n, p in parameters.items() if "lora_" in n)


@pytest.mark.parametrize("kind", KINDS)
def test_answering_between_two_steps_changes_no_gradient(kind):
    model = Joined().bfloat16()
    add_adapters(model, adapter(kind, rank=4))
    shake(model)
    learning = [p for n, p in model.named_parameters() if "lora_" in n]

    def gradients():
        return torch.autograd.grad(model(input_ids=IDS).logits.float().square().mean(), learning)

    before = gradients()
    model.eval()
    logits(model)
    for module in model.modules():  # as a trainer does that keeps what stands still in eval mode
        module.training = any(p.requires_grad for p in module.parameters())
    for one, other in zip(before, gradients(), strict=True):
        assert torch.equal(one, other)
    assert all(one.any() for one in before)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_keeps_the_logits_and_leaves_ordinary_layers(kind):
    model = Joined().eval()
    names = {name for name, _ in model.named_parameters()}
    add_adapters(model, adapter(kind, rank=4))
    shake(model)
    before = logits(model)
    difference = merge_adapters(model)
    # On a CPU the 4-bit kernels compute in bfloat16, so the logits before are the rounder ones.
    assert difference < (3e-2 if kind == "qlora" else 1e-5)
    assert float((logits(model) - before).abs().max()) <= difference * 10
    assert {name for name, _ in model.named_parameters()} == names
    assert all(type(layer) is nn.Linear for layer in linear_layers(model).values())
    add_adapters(model, adapter("lora", rank=2))  # and there is room for new ones


def test_merging_in_bfloat16_rounds_each_weight_once():
    model = Joined().bfloat16().eval()
    add_adapters(model, adapter("lora", rank=4))
    shake(model)
    assert merge_adapters(model) < 3e-2
    assert model.model.language.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_a_merge_that_moves_the_logits_is_undone(monkeypatch):
    from peft.tuners.lora import Linear

    model = Joined().eval()
    add_adapters(model, adapter("lora", rank=4))
    shake(model)
    before = logits(model)
    monkeypatch.setattr(Linear, "merge", lambda self, safe_merge: None)
    with pytest.raises(CheckpointError, match=r"moved the logits by .* so they stay"):
        merge_adapters(model)
    assert torch.equal(logits(model), before)
    assert model.peft_config


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_can_be_switched_off_for_a_reference(kind):
    model = Joined().eval()
    add_adapters(model, adapter(kind, rank=4))
    reference = logits(model)
    shake(model)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    tuned = logits(model)
    with adapters_off(model):
        # DoRA's length of a weight is taken over in the last bit only.
        torch.testing.assert_close(logits(model), reference, rtol=0, atol=1e-6)
    assert torch.equal(logits(model), tuned)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == learning


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_peft_itself_opens_the_saved_folder_with_the_connector_in_it(kind, tmp_path):
    from peft import PeftModel

    model = Joined().eval()
    add_adapters(model, adapter(kind, rank=4))
    shake(model)
    with torch.no_grad():
        model.model.connector[0].weight.add_(0.1)
    save_adapters(model, tmp_path / "adapter", base="somebody/base")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    base = Joined().eval()
    opened = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        got = opened(input_ids=IDS).logits
    torch.testing.assert_close(got, logits(model), rtol=0, atol=1e-6)


def test_names_can_be_those_of_another_class(tmp_path):
    from safetensors.torch import load_file

    model = Joined()
    add_adapters(model, adapter("lora", rank=4, targets=["q_proj"]))

    def rename(name: str) -> str:
        name = name.replace("model.language.", "model.language_model.")
        return name.replace("model.connector", "model.multi_modal_projector")

    save_adapters(model, tmp_path / "adapter", rename=rename)
    keys = set(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    stem = "base_model.model.model"
    assert f"{stem}.language_model.layers.0.self_attn.q_proj.lora_A.weight" in keys
    assert f"{stem}.multi_modal_projector.2.bias" in keys


def test_layers_can_be_named():
    names = add_adapters(Joined(), adapter("lora", targets=["q_proj", "v_proj"]))
    assert {name.rsplit(".", 1)[-1] for name in names} == {"q_proj", "v_proj"}


@pytest.mark.parametrize("targets", [["q_porj"], []])
def test_a_layer_that_does_not_exist_is_refused_with_the_known_names(targets):
    with pytest.raises(ConfigError, match=r"down_proj, gate_proj, k_proj"):
        add_adapters(Joined(), adapter("lora", targets=targets))


def test_adapters_are_not_stacked():
    model = Joined()
    add_adapters(model, adapter("lora"))
    with pytest.raises(ConfigError, match="already"):
        add_adapters(model, adapter("lora"))


def test_merging_nothing_is_refused():
    with pytest.raises(CheckpointError, match="no adapters"):
        merge_adapters(Joined())


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gemma2", "mamba"])
def test_every_adapter_of_a_language_model_gets_a_gradient(family):
    model = tiny(family)
    add_adapters(model, adapter("lora", rank=2), prefix="")
    shake(model)
    model(input_ids=IDS).logits.square().sum().backward()
    idle = [n for n, p in model.named_parameters() if "lora_" in n and p.grad is None]
    assert idle == []
    assert merge_adapters(model.eval()) < 1e-4


def test_a_missing_peft_is_named_with_its_extra(monkeypatch):
    original = builtins.__import__

    def without_peft(name, *args, **kwargs):
        if name.split(".")[0] == "peft":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    model = Joined()
    monkeypatch.setattr(builtins, "__import__", without_peft)
    with pytest.raises(MissingExtraError, match=r"pip install 'mmlm\[train\]'"):
        add_adapters(model, adapter("lora"))


@pytest.mark.parametrize("kind", list(adapters))
def test_an_adapter_survives_json(kind):
    config = adapter(kind, rank=8, targets=["q_proj"])
    assert adapters.read(config.to_dict(), origin="again") == config
    assert config.scale == 16
