"""The words of a question reach the picture; those of an answer, of others, or padding do not."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from mmlm.assistant import load
from mmlm.errors import AlignmentError, ConfigError
from mmlm.generation import GenerationSettings, Request
from mmlm.generation.session import Sessions
from mmlm.messages import assistant, user
from mmlm.modeling.questions import turn_numbers
from tests.tiny import compose_tiny, picture

FIBER = {"use": "fiber", "blocks": 1, "tokens": 3, "heads": 4, "encoder_blocks": 1,
         "encoder_heads": 4}  # fmt: skip
CONDITIONED = {"use": "language_conditioned", "encoder_blocks": 2, "adapter_width": 8}
MEMORY = {"use": "text_memory", "depth": 2, "drop_after": 1, "keep": 0.4}
KINDS = [FIBER, CONDITIONED, MEMORY]


def opened(folder, words, **parts):
    """Return a tiny assistant with open gates."""
    made = compose_tiny(folder, connector=words, **parts)
    with torch.no_grad():
        for name, weight in made.model.named_parameters():
            if name.endswith("_gate"):
                weight.fill_(1.0)
    return made


def seen(made, ids, pixels=None, **more):
    """Return what the picture becomes before the language model: what reads it, or its tokens."""
    held = {}

    def keep(module, given, output):
        held["values"] = (output.layers[0] if output.layers else output).values.detach()

    hook = made.model.model.connector.register_forward_hook(keep)
    with torch.no_grad():
        made.model(input_ids=torch.tensor(ids), pixel_values=pixels, **more)
    hook.remove()
    return held["values"]


def talk(made, question, answer=None):
    """Return the ids of a conversation, and the picture's pixels."""
    turns = [user(question, [picture(1)])] + ([assistant(answer)] if answer else [])
    row = made.processor.encode_chat(turns, add_generation_prompt=not answer, with_pixels=True)
    return row.ids, row.pixel_values


@pytest.fixture(scope="module", params=KINDS, ids=lambda words: words["use"])
def made(request, tmp_path_factory):
    return opened(tmp_path_factory.mktemp(request.param["use"]), request.param)


def test_turns_begin_behind_answers_and_with_samples():
    ids = [3, 4, 1, 2, 8, 9, 5, 3, 1, 2, 7]
    assert turn_numbers(ids, [1, 2], [9]) == [1, 1, 0, 0, 0, 0, 2, 2, 0, 0, 0]
    begins = [False] * 7 + [True] + [False] * 3
    assert turn_numbers(ids, [1, 2], [9], begins=begins)[6:8] == [2, 3]
    assert turn_numbers([3, 9, 4], [1, 2], [9]) == [1, 1, 1]  # a user's turn may end like an answer


def test_a_picture_hangs_on_its_question_and_not_on_the_answer(made):
    ids, pixels = talk(made, "What is red?")
    other, _ = talk(made, "How many cats?")
    taught, _ = talk(made, "What is red?", "The cat on the left.")
    first = seen(made, [ids], pixels)
    assert (first - seen(made, [other], pixels)).abs().max() > 1e-4
    # Padding of the matrices differs with the length alone.
    torch.testing.assert_close(seen(made, [taught], pixels), first, rtol=0, atol=1e-5)


def test_packed_and_padded_samples_ask_for_themselves(made):
    ids, pixels = talk(made, "What is red?", "It.")
    other, more = talk(made, "How many cats?", "Two of them.")
    alone, beside = seen(made, [ids], pixels), seen(made, [other], more)
    both = torch.cat([pixels, more])
    borders = torch.tensor([0, len(ids), len(ids) + len(other)], dtype=torch.int32)
    places = torch.cat([torch.arange(len(ids)), torch.arange(len(other))])[None]
    packed = seen(made, [ids + other], both, cu_seq_lens_q=borders, position_ids=places)
    torch.testing.assert_close(packed, torch.cat([alone, beside]), rtol=0, atol=1e-5)
    width = max(len(ids), len(other))
    rows = [[7] * (width - len(each)) + each for each in (ids, other)]
    mask = torch.tensor([[0] * (width - len(e)) + [1] * len(e) for e in (ids, other)])
    padded = seen(made, rows, both, attention_mask=mask)
    torch.testing.assert_close(padded, torch.cat([alone, beside]), rtol=0, atol=1e-5)


def test_answers_are_the_same_alone_in_a_batch_and_with_kept_caches(made, tmp_path):
    asked = ["What is red?", "How many cats are on the hill?"]
    requests = [Request(question=text, images=[picture(1)]) for text in asked]
    settings = GenerationSettings(max_new_tokens=5)
    alone = [made.answer(text, [picture(1)], max_new_tokens=5) for text in asked]
    assert made.answer_all(requests, max_new_tokens=5, batch_size=2) == alone
    sessions = Sessions(made.model, made.processor)
    turns = [[user(text, [picture(1)])] for text in asked]
    # The picture is kept, and seen anew because something else is asked about it.
    assert [sessions.answer(turn, settings)[0] for turn in turns] == alone
    more = [*turns[1], assistant(alone[1]), user("And now?", [picture(2)])]
    fresh = Sessions(made.model, made.processor).answer(more, settings)[0]
    assert sessions.answer(more, settings)[0] == fresh
    made.save(tmp_path / "saved")
    back = load(tmp_path / "saved", device="cpu")
    assert back.answer(asked[0], [picture(1)], max_new_tokens=5) == alone[0]


def test_a_picture_behind_a_foreign_cache_is_refused(made):
    ids, pixels = talk(made, "What?")
    cache = DynamicCache(config=made.model.config.text_config)
    with torch.no_grad():
        made.model(input_ids=torch.tensor([[5, 6]]), past_key_values=cache, use_cache=True)
        with pytest.raises(AlignmentError, match="from its beginning"):
            made.model(input_ids=torch.tensor([ids]), pixel_values=pixels, past_key_values=cache)


@pytest.mark.parametrize("words", [FIBER, CONDITIONED], ids=lambda words: words["use"])
def test_in_step_0_the_encoder_is_what_it_was_and_its_words_learn(words, tmp_path):
    made = compose_tiny(tmp_path, connector=words)
    model = made.model.requires_grad_(False)
    model.model.connector.requires_grad_(True)
    ids, pixels = talk(made, "What is red?")
    plain = model.model.encode_images(pixels).values  # nothing is asked here
    held = []
    hook = model.model.vision.register_forward_hook(lambda *given: held.append(given[2].values))
    logits = model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits
    hook.remove()
    torch.testing.assert_close(held[0], plain, rtol=0, atol=0)
    logits[0, -1].log_softmax(-1)[7].backward()
    gates = {
        n: p for n, p in model.named_parameters() if n.endswith("_gate") and p.grad is not None
    }
    if words is CONDITIONED:  # behind closed gates of the language model nothing learns yet
        assert all(gate.grad.any() for gate in gates.values())
    assert all(p.grad is None for n, p in model.named_parameters() if ".connector." not in n)


def test_background_goes_by_attention_and_costs_grow_with_the_words_alone(tmp_path):
    made = opened(tmp_path, MEMORY)
    ids, _ = talk(made, "What is red?")
    assert made.processor.count_tokens(picture(1)) == 7  # 0.4 of 16, rounded up
    assert ids.count(made.model.config.image_token_id) == 7
    connector = made.model.model.connector
    layer = connector.layers[0]
    tokens = torch.randn(1, 16, 32, generator=torch.manual_seed(1))
    scores = layer.looked_at(tokens)
    attention, given = layer.attention, layer.norm(tokens)
    query = attention.query(given).view(1, 16, 8, 4).transpose(1, 2)
    key = attention.key(given).view(1, 16, 8, 4).transpose(1, 2)
    wanted = torch.zeros(16)
    for head in range(8):
        for place in range(16):
            row = (query[0, head, place] @ key[0, head].T / 2).softmax(-1)
            wanted += row / (8 * 16)
    torch.testing.assert_close(scores[0], wanted, rtol=0, atol=1e-6)
    # Words are keys and values alone: a patch never becomes a word, and words see no patch.
    assert connector.reader((torch.randn(3, 32),)).values.shape == (1, 3, 32)


def test_encoders_and_policies_that_cannot_be_asked_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="tiles of one size"):
        compose_tiny(tmp_path, connector=CONDITIONED, image={"use": "native"}, vision="patches")
    with pytest.raises(ConfigError, match="does not take clips"):
        compose_tiny(tmp_path, connector=MEMORY, video={"use": "frames"})
    with pytest.raises(ConfigError, match="depend on 2"):
        compose_tiny(tmp_path, connector={**CONDITIONED, "encoder_blocks": 3})


def test_blocks_of_another_width_than_the_features_are_refused(tmp_path):
    tower = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48,
             "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
             "projection_dim": 24}  # fmt: skip
    eye = {"use": "embedding", "config": tower}
    words = {**CONDITIONED, "encoder_blocks": 1}
    made = compose_tiny(tmp_path, eye=eye, connector=words)
    with pytest.raises(ConfigError, match="32 wide and its features 24"):
        made.answer("What?", [picture(1)], max_new_tokens=1)
