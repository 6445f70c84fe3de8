"""MM-LoRA: text and image tokens go through adapters of their own, and stay beside the weights."""

from __future__ import annotations

import copy

import pytest
import torch

import mmlm
from mmlm.errors import CheckpointError, ConfigError
from mmlm.language.adapters import MMLoraAdapterConfig, add_adapters, merge_adapters, save_adapters
from mmlm.language.routing import IMAGES, TEXT, is_routed
from tests.language.models import tiny as language_model
from tests.tiny import compose_tiny, picture

pytest.importorskip("peft", reason="needs the extra [train]")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return compose_tiny(tmp_path_factory.mktemp("parts"))


@pytest.fixture
def assistant(plain):
    """An assistant whose adapters for text and for images differ from nothing and each other."""
    model = copy.deepcopy(plain.model)
    torch.manual_seed(1)
    add_adapters(model, MMLoraAdapterConfig(rank=6, image_rank=2))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                weight.normal_(std=0.3)
    return type(plain)(model, plain.processor)


def inputs(assistant):
    looks = assistant.processor.image_processor
    image = assistant.model.config.image_token_id
    ids = [5, *[image] * assistant.processor.count_tokens(picture(1)), 9, 11]
    given = {"input_ids": torch.tensor([ids])}
    return given | looks.together([looks.look(picture(1))])


def first_layer(model):
    return model.get_submodule("model.language.layers.0.self_attn.q_proj")


def test_each_token_goes_through_the_product_of_its_kind(assistant):
    """Against the definition: one product for each row, chosen by hand."""
    layer, seen = first_layer(assistant.model), {}
    layer.register_forward_hook(lambda _, args, out: seen.update(x=args[0], y=out))
    given = inputs(assistant)
    with torch.no_grad():
        assistant.model(**given)
    ids = given["input_ids"][0].tolist()
    for place, token in enumerate(ids):
        kind = IMAGES if token == assistant.model.config.image_token_id else TEXT
        rank = {IMAGES: 2, TEXT: 6}[kind]
        a, b = layer.lora_A[kind].weight, layer.lora_B[kind].weight
        assert a.shape[0] == rank
        x = seen["x"][0, place]
        wanted = layer.base_layer(x) + 2.0 * (b @ (a @ x))  # alpha is twice the rank
        torch.testing.assert_close(seen["y"][0, place], wanted, rtol=1e-5, atol=1e-5)


def test_the_product_for_images_learns_from_images_alone(assistant):
    model = assistant.model
    model(input_ids=torch.tensor([[5, 9, 11]])).logits.sum().backward()
    layer = first_layer(model)
    assert layer.lora_A[TEXT].weight.grad.abs().max() > 0
    # Not left out: every process of a training takes part in every step.
    assert layer.lora_A[IMAGES].weight.grad.abs().max() == 0
    model(**inputs(assistant)).logits.sum().backward()
    assert layer.lora_A[IMAGES].weight.grad.abs().max() > 0
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(".base_layer." in name for name in learning)
    assert {name.split(".")[-2] for name in learning if "lora_" in name} == {TEXT, IMAGES}


def test_a_fresh_one_changes_nothing_and_the_cache_changes_nothing(plain, assistant):
    fresh = copy.deepcopy(plain.model)
    add_adapters(fresh, MMLoraAdapterConfig())
    given = inputs(plain)
    with torch.no_grad():
        torch.testing.assert_close(fresh(**given).logits, plain.model(**given).logits)
        whole = assistant.model(**given).logits[0, -1]
        head = {**given, "input_ids": given["input_ids"][:, :-1]}
        cache = assistant.model(**head, use_cache=True).past_key_values
        last = given["input_ids"][:, -1:]
        step = assistant.model(input_ids=last, past_key_values=cache).logits[0, -1]
    torch.testing.assert_close(step, whole, rtol=1e-4, atol=1e-4)


def test_it_comes_back_from_a_delta_and_from_nothing_else(assistant, plain, tmp_path):
    assistant.save(tmp_path / "delta", delta=True)
    again = mmlm.load(tmp_path / "delta", device="cpu")
    assert is_routed(again.model)
    given = inputs(assistant)
    with torch.no_grad():
        wanted = assistant.model(**given).logits
        torch.testing.assert_close(again.model(**given).logits, wanted)
        assert (plain.model(**given).logits - wanted).abs().max() > 1e-2
    with pytest.raises(CheckpointError, match=r"chosen token by token .*delta=True"):
        assistant.save(tmp_path / "whole")
    with pytest.raises(CheckpointError, match=r"cannot be merged.*delta=True"):
        merge_adapters(assistant.model)
    with pytest.raises(CheckpointError, match="PEFT has no such adapter"):
        save_adapters(assistant.model, tmp_path / "peft")


def test_a_served_voice_is_routed_as_the_folder_is(assistant, plain, tmp_path):
    from mmlm.serving.adapters import Voices

    assistant.save(tmp_path / "delta", delta=True)
    base = copy.deepcopy(plain.model)
    voices, given = Voices(base), inputs(assistant)
    voices.add("tuned", str(tmp_path / "delta"))
    with torch.no_grad():
        with voices.using("tuned"):
            tuned = base(**given).logits
        with voices.using(""):
            untouched = base(**given).logits
        torch.testing.assert_close(tuned, assistant.model(**given).logits)
        torch.testing.assert_close(untouched, plain.model(**given).logits)


def test_a_model_without_pictures_is_refused():
    with pytest.raises(ConfigError, match="has no placeholder for images"):
        add_adapters(language_model("llama"), MMLoraAdapterConfig(), prefix="")
