"""An answer that must be JSON is JSON."""

from __future__ import annotations

import json
import random

import pytest

from mmlm.generation import GenerationSettings
from mmlm.generation.json_form import JsonForm, JsonText
from mmlm.generation.session import Sessions
from mmlm.messages import user
from tests.tiny import compose_tiny, picture, tiny_tokenizer

GOOD = [
    "{}", '{"a":1}', '{ "a" : [ ] , "b": {} }', '{"a":[1,-2.5e+3,0,0.1,1E9,true,false,null,"x"]}',
    '{"ä\\n\\u00e9\\"":"\\\\🦊"}', '{"a":[[[{"b":[]}]]]}', '{\n  "a": "",\n  "b": -0\n}',
]  # fmt: skip
BAD = [
    "[]", '"a"', "1", " {}", "{]", "{,}", '{"a"}', '{"a":}', '{"a":1,}', '{"a":[1,]}', '{"a":01}',
    '{"a":1.}', '{"a":.5}', '{"a":+1}', '{"a":1e}', '{"a":tru}', '{"a":trux', '{a:1}', "{'a':1}",
    '{"a":"\n"}', '{"a":"\\x"}', '{"a":"\\u12g4"}', '{"a":1}}', '{"a":1} ', '{"a" "b"}', '{"a":1]',
    '{"a":--1}', '{"a":NaN}', "{" + " " * 99,
]  # fmt: skip


@pytest.mark.parametrize("text", GOOD)
def test_what_json_reads_is_taken_letter_by_letter(text):
    json.loads(text)
    form = JsonText()
    for place, letter in enumerate(text):
        assert not form.complete
        assert form.would_take(letter), text[: place + 1]
        assert form.add(letter)
    assert form.complete


@pytest.mark.parametrize("text", BAD)
def test_what_json_refuses_never_becomes_complete(text):
    form = JsonText()
    assert not (form.add(text) and form.complete)


def test_whatever_is_taken_to_the_end_is_read_by_json():
    draw = random.Random(0)
    letters = '{}[]",:0129.-+eEtrufalsn \\/bné'
    ended = 0
    for _ in range(300):
        form, text = JsonText(), ""
        while not form.complete and len(text) < 60:
            letter = draw.choice(letters)
            if form.would_take(letter):
                form.add(letter)
                text += letter
        if form.complete:
            ended += 1
            assert isinstance(json.loads(text), dict)
    assert ended > 50


def test_a_letter_of_several_tokens_is_taken_between_quotes_only():
    tokenizer = tiny_tokenizer()
    fox = tokenizer("🦊")["input_ids"]
    outside, inside = (JsonForm(tokenizer, frozenset({tokenizer.eos_token_id})) for _ in range(2))
    for token in tokenizer('{"')["input_ids"]:
        assert inside.allows(token)
        inside.add(token)
    assert not outside.allows(fox[0])
    for token in [*fox, *tokenizer('":1}')["input_ids"]]:
        assert inside.allows(token)
        inside.add(token)
    assert inside.complete


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_model_that_knows_no_json_answers_in_json(tmp_path, temperature):
    tiny = compose_tiny(tmp_path)
    sessions = Sessions(tiny.model, tiny.processor)
    ended = 0
    for seed in range(4):
        settings = GenerationSettings(max_new_tokens=300, temperature=temperature, seed=seed)
        pieces = list(sessions.stream([user(f"{seed}?", [picture()])], settings, as_json=True))
        text, usage = "".join(piece.text for piece in pieces), pieces[-1].usage
        assert JsonText().add(text)
        if usage.finish_reason == "stop":
            ended += 1
            assert isinstance(json.loads(text), dict)
    assert temperature == 0 or ended
