"""Whatever people write stays text, for every kind of tokenizer."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlm.errors import DataError, TemplateError
from mmlm.language import ChatFormat
from mmlm.messages import ImagePart, Message, Text, assistant, system, user
from tests.language.families import FAMILIES

NAMES = ("chatml", "llama-2", "llama-3", "gemma", "vicuna", "deepseek")
EXACT = ("chatml", "llama-3", "deepseek")  # byte-level: text comes back as it was
TRIMS = {"llama-2", "llama-3", "gemma"}
SNIPPETS = st.sampled_from(
    (
        "<image>",
        "<|im_end|>",
        "<|im_start|>assistant\n",
        "</s>",
        "<s>",
        "[INST]",
        "<end_of_turn>",
        "<|eot_id|>",
        "<｜Assistant｜>",
        "</think>",
        "<",
        "|im_end|>",
        "A cat.",
        "🙂",
        "\n",
        " ",
        "",
    )
)
WORDS = st.lists(st.one_of(SNIPPETS, st.text(max_size=12)), max_size=5).map("".join)
FEW = settings(max_examples=60, deadline=None)


@cache
def chat(name: str) -> ChatFormat:
    return ChatFormat(next(family for family in FAMILIES if family.name == name).tokenizer())


def controls(form: ChatFormat, ids: list[int]) -> list[int]:
    """The control tokens of the family, in order; the unknown token steers nothing."""
    names = form._control_tokens - {"<unk>"}
    steering = {form.tokenizer.convert_tokens_to_ids(name) for name in names}
    return [number for number in ids if number in steering]


@pytest.mark.parametrize("name", NAMES)
@FEW
@given(question=WORDS, answer=WORDS)
def test_nobody_can_write_a_control_token(name, question, answer):
    form = chat(name)
    plain = form.encode([user("Q", [None]), assistant("A")], image_tokens=[2])
    encoded = form.encode([user(question, [None]), assistant(answer)], image_tokens=[2])
    assert controls(form, encoded.ids) == controls(form, plain.ids)
    assert encoded.image_spans[0][1] - encoded.image_spans[0][0] == 2


@pytest.mark.parametrize("name", EXACT)
@FEW
@given(question=WORDS, answer=WORDS)
def test_what_is_learnt_is_what_was_answered(name, question, answer):
    form = chat(name)
    try:
        encoded = form.encode([user(question), assistant(answer)], with_labels=True)
    except TemplateError:
        assert name == "deepseek"  # which cuts an answer at </think>
        assert "</think>" in answer
        return
    learnt = [label for label in encoded.labels if label != -100]
    assert learnt[-1] in form.stop_ids
    said = form.tokenizer.decode(learnt[:-1])
    expected = answer.strip() if name in TRIMS else answer
    # An answer that begins with white space may share its first token with the template's newline.
    assert expected.endswith(said)
    assert expected[: len(expected) - len(said)].strip() == ""


@pytest.mark.parametrize("name", NAMES)
@FEW
@given(texts=st.lists(st.text(max_size=20), min_size=3, max_size=3))
def test_without_control_tokens_the_tokens_are_the_stock_ones(name, texts):
    form = chat(name)
    if any(form._controls.search(text) for text in texts):
        return
    messages = [Message("user", (Text(texts[0]), ImagePart(), Text(texts[1]))), assistant(texts[2])]
    try:
        encoded = form.encode(messages, image_tokens=[3], with_labels=True)
    except TemplateError:
        encoded = form.encode(messages, image_tokens=[3])
        assert name in TRIMS  # a blank text beside an image is trimmed with the line's end
        assert not all(text.strip() for text in texts[:2])
    text = encoded.text.replace("<image>", "<image>" * 3)
    starts = form.tokenizer.bos_token and text.startswith(form.tokenizer.bos_token)
    assert encoded.ids == form.tokenizer(text, add_special_tokens=not starts)["input_ids"]


@pytest.mark.parametrize("name", ["chatml", "llama-2"])
@FEW
@given(words=WORDS, rounds=st.integers(1, 4), told=st.booleans())
def test_every_answer_of_a_long_conversation_is_learnt_once(name, words, rounds, told):
    form = chat(name)
    messages = [system("S")] if told else []
    for _ in range(rounds):
        messages += [user("Q"), assistant(words)]
    encoded = form.encode(messages, with_labels=True)
    stops = [label for label in encoded.labels if label in form.stop_ids]
    assert len(stops) == rounds


def test_half_a_character_is_refused_by_name():
    with pytest.raises(DataError, match="half a character"):
        chat("chatml").encode([user("a \ud800 b")])
