"""Connectors that write into the layers of the language model: Flamingo, DeepStack, eP-ALM."""

from __future__ import annotations

import copy

import pytest
import torch

from mmlm.assistant import load
from mmlm.errors import AlignmentError, ConfigError
from mmlm.messages import user
from tests.tiny import compose_tiny, picture, save_vision

CROSS = {"use": "cross_attention", "blocks": 2, "interval": 1, "tokens": 3, "heads": 4}
FORMS = {
    "cross_attention": ({}, CROSS),
    "cross_attention of all": ({}, {**CROSS, "tokens": None, "latest": False}),
    "deepstack": ({"layers": [0, 1]}, {"use": "deepstack", "layers": 2, "start": 0, "depth": 1}),
    "grounded_qformer": (
        {},
        {"use": "grounded_qformer", "tokens": 3, "depth": 2, "width": 16, "heads": 2}
        | {"mlp_width": 32},
    ),
    "ep_alm": ({"layers": [0, 1]}, {"use": "ep_alm", "layers": 2, "start": 0}),
}


def compose(folder, form):
    eye, connector = FORMS[form]
    checkpoint = str(save_vision(folder / "clip"))
    assistant = compose_tiny(
        folder, eye={"use": "hf", "checkpoint": checkpoint, **eye}, connector=connector
    )
    with torch.no_grad():  # gates begin closed: open them, so that pictures matter
        for name, weight in assistant.model.named_parameters():
            if name.endswith("_gate"):
                weight.fill_(1.0)
    return assistant


@pytest.fixture(scope="module", params=FORMS)
def assistant(request, tmp_path_factory):
    return compose(tmp_path_factory.mktemp("parts"), request.param)


def encoded(assistant, *seeds, text="What?"):
    return assistant.processor.encode_chat(
        [user(text, [picture(seed) for seed in seeds])], add_generation_prompt=True
    )


def tensors(assistant, *prompts):
    """Return prompts side by side in one row."""
    ids = [number for prompt in prompts for number in prompt.ids]
    pixels = [prompt.pixel_values for prompt in prompts if prompt.pixel_values is not None]
    return {"input_ids": torch.tensor([ids])} | (
        {"pixel_values": torch.cat(pixels)} if pixels else {}
    )


@torch.no_grad()
def logits(assistant, *prompts, **more):
    return assistant.model(**tensors(assistant, *prompts), **more).logits[0]


def test_what_stands_before_a_picture_does_not_see_it(assistant):
    one, other = encoded(assistant, 1), encoded(assistant, 2)
    first, second = logits(assistant, one), logits(assistant, other)
    before = one.image_spans[0][0]
    torch.testing.assert_close(first[:before], second[:before], rtol=0, atol=1e-6)
    assert (first[-1] - second[-1]).abs().max() > 1e-4


def test_packed_samples_do_not_see_one_another(assistant):
    prompts = [encoded(assistant, 1), encoded(assistant), encoded(assistant, 2, 3)]
    alone = [logits(assistant, prompt) for prompt in prompts]
    lengths = [len(prompt.ids) for prompt in prompts]
    borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    together = logits(assistant, *prompts, position_ids=positions, cu_seq_lens_q=borders)
    for one, beside in zip(alone, together.split(lengths), strict=True):
        torch.testing.assert_close(one, beside, rtol=0, atol=2e-5)


def test_it_answers_the_same_with_a_cache_as_without(assistant):
    given = tensors(assistant, encoded(assistant, 4))
    words = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = assistant.model.generate(**given, **words)
    anew = assistant.model.generate(**given, **words, use_cache=False)
    assert cached.tolist() == anew.tolist()
    beams = assistant.model.generate(**given, **words, num_beams=2)
    assert beams.shape[0] == 1


def test_answers_in_a_batch_and_in_a_chat_are_those_of_each_alone(assistant):
    from mmlm.assistant import Request

    asked = [
        ("What?", [picture(1)]),
        ("And this longer one?", [picture(2), picture(3)]),
        ("Hi", []),
    ]
    alone = [assistant.answer(text, seen, max_new_tokens=6) for text, seen in asked]
    requests = [Request(text, seen) for text, seen in asked]
    assert assistant.answer_all(requests, max_new_tokens=6) == alone
    chat = assistant.chat(max_new_tokens=4)
    first = chat.ask("What?", images=[picture(1)])
    assert first == assistant.answer("What?", [picture(1)], max_new_tokens=4)
    assert isinstance(chat.ask("And now?"), str)


def test_it_learns_with_gradient_checkpointing_as_without(assistant):
    model = copy.deepcopy(assistant.model).train()
    given = tensors(assistant, encoded(assistant, 1))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**given, labels=given["input_ids"], use_cache=False).loss.backward()
        learnt = model.model.connector.named_parameters()
        gradients.append({name: weight.grad.clone() for name, weight in learnt})
    for name, plain in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], plain, rtol=1e-4, atol=1e-6)
        assert plain.any() or name.endswith("key.bias"), name


def test_it_comes_back_from_a_folder(assistant, tmp_path):
    reasons = assistant.save(tmp_path / "model")
    assert any("connector" in reason for reason in reasons)
    again = load(tmp_path / "model", device="cpu")
    prompt = encoded(assistant, 5)
    torch.testing.assert_close(logits(again, prompt), logits(assistant, prompt), rtol=0, atol=1e-5)


def test_closed_gates_leave_the_language_model_as_it_was(tmp_path):
    eye = {"use": "hf", "checkpoint": str(save_vision(tmp_path / "clip"))}
    assistant = compose_tiny(tmp_path, eye=eye, connector=CROSS)
    one, other = (logits(assistant, encoded(assistant, seed)) for seed in (1, 2))
    assert torch.equal(one, other)


def test_a_cache_without_its_pictures_is_refused(tmp_path):
    assistant = compose(tmp_path, "cross_attention")
    given = tensors(assistant, encoded(assistant, 1))
    cache = assistant.model(**given, use_cache=True).past_key_values
    del cache.mmlm_pictures
    with pytest.raises(AlignmentError, match="pictures are not known"):
        assistant.model(input_ids=torch.tensor([[5]]), past_key_values=cache, use_cache=True)


def test_layers_beyond_the_language_model_are_refused(tmp_path):
    eye = {"use": "hf", "checkpoint": str(save_vision(tmp_path / "clip"))}
    with pytest.raises(ConfigError, match="layer 4 of a language model that has 2"):
        compose_tiny(tmp_path, eye=eye, connector={**CROSS, "interval": 4})
