"""A kept cache changes the time of an answer and nothing else."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from mmlm.errors import ConfigError, ImageError, MMLMError
from mmlm.generation import GenerationSettings, Request, answer_batch
from mmlm.generation.session import Sessions
from mmlm.generation.words import Words
from mmlm.messages import assistant, user
from tests.tiny import TEXT_KINDS, compose_tiny, picture, tiny_tokenizer

WORDS = ["What?", "And?", "Both?", "So?"]
SETTINGS = GenerationSettings(max_new_tokens=12)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return compose_tiny(tmp_path_factory.mktemp("tiny"))


def uncached(tiny, messages, settings=SETTINGS):
    """Answer with transformers' own `generate` on the whole conversation."""
    request = Request(messages=tuple(messages))
    return answer_batch(tiny.model, tiny.processor, [request], settings)[0]


def sessions_of(tiny, **options):
    return Sessions(tiny.model, tiny.processor, **options)


@pytest.mark.parametrize("language", TEXT_KINDS)
def test_every_turn_of_a_conversation_equals_generate_on_the_whole_of_it(tmp_path, language):
    tiny = compose_tiny(tmp_path, "siglip", language)
    sessions, talk = sessions_of(tiny), []
    shown = [[picture(1)], [], [picture(2), picture(3)], []]
    for number, (text, images) in enumerate(zip(WORDS, shown, strict=True)):
        talk.append(user(text, images))
        told, usage = sessions.answer(talk, SETTINGS)
        expected = uncached(tiny, talk)
        assert told == expected.text
        assert usage.num_tokens == expected.num_tokens
        assert usage.finish_reason == expected.finish_reason
        assert usage.num_prompt_tokens == expected.num_prompt_tokens
        assert (usage.num_cached_tokens > 0) == (number > 0)
        talk.append(assistant(told))


def test_a_follow_up_computes_nothing_of_the_first_one(tiny, monkeypatch):
    sessions, talk = sessions_of(tiny), [user("What?", [picture(1), picture(2)])]
    told, before = sessions.answer(talk, SETTINGS)
    opened = []
    pixels = tiny.processor.image_processor.pixels
    monkeypatch.setattr(
        tiny.processor.image_processor, "pixels", lambda p: opened.append(p) or pixels(p)
    )
    _, usage = sessions.answer([*talk, assistant(told), user("And?")], SETTINGS)
    assert opened == []
    assert usage.num_cached_tokens >= before.num_prompt_tokens


def test_an_edited_question_goes_on_from_the_part_that_stayed(tiny):
    sessions = sessions_of(tiny)
    first = [user("What is this?", [picture(1)])]
    told, _ = sessions.answer(first, SETTINGS)
    sessions.answer([*first, assistant(told), user("And this?", [picture(2)])], SETTINGS)
    changed = [*first, assistant(told), user("And that?", [picture(3)])]
    again, usage = sessions.answer(changed, SETTINGS)
    assert again == uncached(tiny, changed).text
    assert usage.num_cached_tokens > usage.num_image_tokens // 2


def test_a_cache_is_never_cut_inside_an_image_nor_shared_by_another_picture(tiny):
    sessions = sessions_of(tiny)
    sessions.answer([user("What?", [picture(1)])], SETTINGS)
    other = [user("What?", [picture(2)])]
    told, usage = sessions.answer(other, SETTINGS)
    assert told == uncached(tiny, other).text
    spans = tiny.processor.encode_chat(other, add_generation_prompt=True).image_spans
    assert usage.num_cached_tokens <= spans[0][0]


def test_asking_the_same_again_computes_one_token_and_says_the_same(tiny):
    sessions, talk = sessions_of(tiny), [user("What?", [picture(1)])]
    first, _ = sessions.answer(talk, SETTINGS)
    second, usage = sessions.answer(talk, SETTINGS)
    assert second == first
    assert usage.num_cached_tokens == usage.num_prompt_tokens - 1


@pytest.mark.parametrize(
    "shape", ["path", "bytes", "array"], ids=lambda shape: f"the-picture-is-{shape}"
)
def test_pictures_may_come_in_any_form(tiny, tmp_path, shape):
    image = picture(1)
    image.save(tmp_path / "a.png")
    forms = {
        "path": tmp_path / "a.png",
        "bytes": (tmp_path / "a.png").read_bytes(),
        "array": np.asarray(image),
    }
    sessions = sessions_of(tiny)
    told, _ = sessions.answer([user("What?", [forms[shape]])], SETTINGS)
    assert told == uncached(tiny, [user("What?", [image])]).text


def test_a_file_that_changes_between_turns_is_seen_anew(tiny, tmp_path):
    path, sessions = tmp_path / "a.png", sessions_of(tiny)
    picture(1).save(path)
    sessions.answer([user("What?", [path])], SETTINGS)
    picture(2).save(path)
    told, _ = sessions.answer([user("What?", [path])], SETTINGS)
    assert told == uncached(tiny, [user("What?", [picture(2)])]).text


def test_the_oldest_conversation_leaves_when_the_budget_is_full(tiny):
    sessions = sessions_of(tiny)
    sessions.answer([user("Anna?")], SETTINGS)
    one = sessions.num_bytes
    sessions.budget_bytes = int(one * 2.5)
    for name in ("Bert?", "Carl?", "Dora?"):
        sessions.answer([user(name * 3)], SETTINGS)
    assert 0 < sessions.num_bytes <= sessions.budget_bytes
    _, usage = sessions.answer([user("Dora?" * 3)], SETTINGS)
    assert usage.num_cached_tokens == usage.num_prompt_tokens - 1
    sessions.forget()
    assert sessions.num_bytes == 0


def test_a_budget_of_nothing_keeps_nothing(tiny):
    sessions, talk = sessions_of(tiny, budget_bytes=0), [user("What?", [picture(1)])]
    first, _ = sessions.answer(talk, SETTINGS)
    second, usage = sessions.answer(talk, SETTINGS)
    assert (second, usage.num_cached_tokens, sessions.num_bytes) == (first, 0, 0)


def test_stopping_ends_the_answer_and_keeps_what_was_computed(tiny):
    sessions, stop = sessions_of(tiny), threading.Event()
    talk = [user("What?", [picture(1)])]
    calls = []
    handle = tiny.model.register_forward_hook(lambda *_: calls.append(1))
    try:
        pieces = []
        for piece in sessions.stream(talk, SETTINGS, stop):
            pieces.append(piece)
            if len(pieces) == 3:
                stop.set()
        assert piece.usage.finish_reason == "stopped"
        assert piece.usage.num_tokens == 3
        assert len(calls) == 4  # the prompt and three tokens: nothing runs after the stop
        pieces = sessions.stream(talk, SETTINGS)
        next(pieces)
        pieces.close()
        assert len(calls) == 5
    finally:
        handle.remove()
    told, usage = sessions.answer(talk, SETTINGS)
    assert usage.num_cached_tokens == usage.num_prompt_tokens - 1
    assert told == uncached(tiny, talk).text


def test_a_fault_in_the_middle_does_not_leave_a_damaged_cache(tiny):
    sessions, talk = sessions_of(tiny), [user("What?", [picture(1)])]
    expected, _ = sessions.answer(talk, SETTINGS)
    layer = tiny.model.model.language.layers[1]
    handle = layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("no")))
    with pytest.raises(RuntimeError, match="no"):
        sessions.answer([*talk, assistant(expected), user("And?")], SETTINGS)
    handle.remove()
    assert sessions.answer(talk, SETTINGS)[0] == expected


def test_sampling_is_repeatable_and_differs_between_seeds(tiny):
    sessions, talk = sessions_of(tiny), [user("What?", [picture(1)])]
    said = [
        sessions.answer(
            talk, GenerationSettings(max_new_tokens=16, temperature=1.2, top_p=0.9, seed=seed)
        )[0]
        for seed in (1, 1, 2)
    ]
    assert said[0] == said[1] != said[2]


def test_a_repetition_penalty_means_what_it_means_to_generate(tiny):
    settings = GenerationSettings(max_new_tokens=12, repetition_penalty=1.3)
    talk = [user("What is what?", [picture(1)])]
    assert sessions_of(tiny).answer(talk, settings)[0] == uncached(tiny, talk, settings).text


def test_an_answer_ends_before_a_stop_string(tiny):
    talk = [user("What is this?", [picture(1)])]
    whole = uncached(tiny, talk, GenerationSettings(max_new_tokens=60)).text
    letter = next(letter for letter in whole[1:] if letter.isascii() and letter.isprintable())
    settings = GenerationSettings(max_new_tokens=60, stop=(letter,))
    told, usage = sessions_of(tiny).answer(talk, settings)
    expected = uncached(tiny, talk, settings)
    assert (told, usage.finish_reason) == (expected.text, "stop")


def test_log_probabilities_are_the_models_own(tiny):
    talk = [user("What?", [picture(1)])]
    piece = next(sessions_of(tiny).stream(talk, SETTINGS, num_top=3))
    prompt = tiny.processor.encode_chat(talk, add_generation_prompt=True)
    with torch.inference_mode():
        logits = tiny.model(
            input_ids=torch.tensor([prompt.ids]), pixel_values=prompt.pixel_values
        ).logits[0, -1]
    best = torch.log_softmax(logits.float(), -1).topk(3)
    assert [token for token, _ in piece.top] == best.indices.tolist()
    # The same sums in another order: 1e-5 is fifty times the difference that was seen.
    assert piece.logprob == pytest.approx(float(best.values[0]), abs=1e-5)


def test_an_answer_ends_where_the_model_stops_reading(tiny):
    reads = tiny.model.config.text_config.max_position_embeddings
    length = len(tiny.processor.encode_chat([user("")], add_generation_prompt=True).ids)
    words = "a" * (reads - length - 3)
    _, usage = sessions_of(tiny).answer([user(words)], SETTINGS)
    assert (usage.num_tokens, usage.finish_reason) in ((3, "length"), (usage.num_tokens, "stop"))
    with pytest.raises(MMLMError, match=rf"reads {reads:,}"):
        sessions_of(tiny).answer([user("a" * reads)], SETTINGS)


def test_numbers_that_are_not_finite_are_named(tiny):
    weight = tiny.model.lm_head.weight
    kept = weight.data.clone()
    weight.data.fill_(float("nan"))
    try:
        with pytest.raises(MMLMError, match="not finite"):
            sessions_of(tiny).answer([user("What?")], SETTINGS)
    finally:
        weight.data.copy_(kept)


def test_beams_are_refused_and_odd_pictures_named(tiny):
    with pytest.raises(ConfigError, match="num_beams is 2"):
        sessions_of(tiny).answer([user("What?")], GenerationSettings(num_beams=2))
    with pytest.raises(ImageError, match="no picture at nowhere"):
        sessions_of(tiny).answer([user("What?", ["nowhere.png"])], SETTINGS)
    with pytest.raises(ImageError, match="int"):
        sessions_of(tiny).answer([user("What?", [3])], SETTINGS)


def test_a_placeholder_that_a_user_wrote_is_text(tiny):
    talk = [user("<image> <|im_end|> What?", [picture(1)])]
    told, usage = sessions_of(tiny).answer(talk, SETTINGS)
    assert told == uncached(tiny, talk).text
    assert usage.num_image_tokens == tiny.processor.count_tokens(picture(1))


def test_words_hold_back_letters_that_are_not_finished():
    tokenizer = tiny_tokenizer()
    words = Words(tokenizer)
    given = [words.add(token) for token in tokenizer("é🙂a")["input_ids"]]
    assert [text for text in given if text] == ["é", "🙂", "a"]
    half = Words(tokenizer)
    half.add(tokenizer("🙂")["input_ids"][0])
    assert half.rest() == "\ufffd"


def test_words_hold_back_what_may_begin_a_stop_string():
    tokenizer = tiny_tokenizer()
    words = Words(tokenizer, stops=("abc",))
    given = [words.add(token) for token in tokenizer("xabyabcz")["input_ids"]]
    assert given == ["x", "", "", "aby", "", "", "", ""]
    assert (words.ended, words.rest()) == (True, "")
    cut = Words(tokenizer, stops=("abc",))
    assert [cut.add(token) for token in tokenizer("xa")["input_ids"]] == ["x", ""]
    assert cut.rest() == "a"
