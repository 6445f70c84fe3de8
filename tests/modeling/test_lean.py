"""Lean layers: the same bits forward, the same gradients, and less kept in between."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from mmlm.modeling.lean import LeanMLP, LeanNorm, keep_all, keep_less
from tests.tiny import TEXT

FAMILIES = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma": GemmaConfig,
    "gemma3": Gemma3TextConfig,
    "olmo2": Olmo2Config,
}
HALF = ("llama", "gemma3", "olmo2")  # each goes from float32 to the result in its own way
IDS = torch.arange(34).view(2, 17) % 29


def made(config_class, dtype=torch.float32, **words):
    torch.manual_seed(0)
    words = TEXT | {"vocab_size": 61, "head_dim": 8, "pad_token_id": 0} | words
    model = AutoModelForCausalLM.from_config(config_class(**words)).to(dtype).train()
    with torch.no_grad():
        for parameter in model.parameters():  # norms are made with ones, which hide the rule
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def learn(model):
    """Return the logits, the gradients, and the bytes that were kept for the backward pass."""
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logits = model(input_ids=IDS).logits
    model.zero_grad()
    torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), IDS.flatten()).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logits, gradients, sum(size for place, size in kept.items() if place not in own)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, torch.float32) for family in FAMILIES), *((f, torch.bfloat16) for f in HALF)],
    ids=str,
)
def test_results_are_the_same_and_less_is_kept(family, dtype):
    model = made(FAMILIES[family], dtype)
    logits, gradients, before = learn(model)
    layers = model.config.num_hidden_layers
    assert keep_less(model) >= 3 * layers + 1  # two norms and an MLP a layer, and the last norm
    again, others, after = learn(model)
    assert torch.equal(logits, again)
    assert others.keys() == gradients.keys()
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    for name, gradient in gradients.items():
        scale = gradient.float().abs().max()
        assert (others[name].float() - gradient.float()).abs().max() <= tolerance * scale, name
    assert after < 0.87 * before


def test_gradients_are_those_of_float64():
    """The backward pass is our own formula: it must be the derivative, not only near to it."""
    model = made(LlamaConfig)
    keep_less(model)
    norm = next(m for m in model.modules() if isinstance(m, LeanNorm))
    torch.manual_seed(1)
    hidden = torch.randn(1100, norm.weight.shape[0], requires_grad=True)
    pulled = torch.randn(hidden.shape)
    norm(hidden).backward(pulled)
    exact = hidden.detach().double().requires_grad_()
    weight = norm.weight.detach().double().requires_grad_()
    scale = (exact.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
    (weight * exact * scale).backward(pulled.double())
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-4)


def test_what_is_of_another_form_is_left_alone():
    assert keep_less(made(PhiConfig)) == 0  # layer norms, and an MLP without a gate
    fused = made(Phi3Config)  # gate and up in one matrix
    keep_less(fused)
    assert not any(isinstance(m, LeanMLP) for m in fused.modules())

    model = made(LlamaConfig)
    plain = type(model.model.norm)

    class OtherRMSNorm(plain):
        def forward(self, hidden_states):
            return super().forward(hidden_states) * 1.5

    model.model.norm.__class__ = OtherRMSNorm
    keep_less(model)
    assert type(model.model.norm) is OtherRMSNorm
    assert isinstance(model.model.layers[0].input_layernorm, LeanNorm)


def test_it_can_be_taken_back_and_copied():
    model = made(LlamaConfig)
    before = [type(module) for module in model.modules()]
    names = list(model.state_dict())
    changed = keep_less(model)
    assert changed > 0
    assert keep_less(model) == 0
    assert list(model.state_dict()) == names
    assert [type(m).__name__ for m in model.modules()] == [kind.__name__ for kind in before]
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.norm.weight.mul_(2.0)
    assert not torch.equal(learn(model)[0], learn(other)[0])
    keep_all(model)
    assert [type(module) for module in model.modules()] == before


def test_adapters_learn_the_same():
    from peft import LoraConfig, get_peft_model

    found = []
    for lean in (False, True):
        torch.manual_seed(0)
        config = LoraConfig(target_modules=["gate_proj", "up_proj", "down_proj"], r=4)
        model = get_peft_model(made(LlamaConfig), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        if lean:
            assert keep_less(model) > 0
        found.append(learn(model))
    (logits, gradients, before), (again, others, after) = found
    assert torch.equal(logits, again)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-6)
    assert after < before


def test_layers_that_are_computed_again_learn_the_same_bits():
    found = []
    for recomputes in (False, True):
        model = made(LlamaConfig)
        if recomputes:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        keep_less(model, recomputes=recomputes)
        found.append(learn(model))
    (logits, gradients, before), (again, others, after) = found
    assert torch.equal(logits, again)
    assert all(torch.equal(gradient, others[name]) for name, gradient in gradients.items())
    assert after < before / 2


def test_frozen_layers_pass_the_gradient_on():
    model = made(LlamaConfig)
    model.requires_grad_(False)
    model.model.embed_tokens.weight.requires_grad_()
    _, gradients, _ = learn(model)
    keep_less(model)
    _, others, _ = learn(model)
    assert list(others) == list(gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-6)
