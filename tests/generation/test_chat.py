"""A conversation: what it remembers, and what it forgets."""

from __future__ import annotations

import pytest

from mmlm.generation import Request
from tests.tiny import compose_tiny, picture


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return compose_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("beams", [1, 2])
def test_a_chat_says_what_the_whole_conversation_would_be_answered(tiny, beams):
    chat = tiny.chat(max_new_tokens=8, num_beams=beams)
    for question, images in (("What?", [picture(1)]), ("And?", []), ("This?", [picture(2)])):
        told = chat.ask(question, images)
        request = Request(messages=tuple(chat.messages[:-1]))
        assert tiny.answer_all([request], max_new_tokens=8, num_beams=beams) == [told]


def test_streamed_pieces_join_to_the_answer_and_are_remembered(tiny):
    chat = tiny.chat(max_new_tokens=8)
    pieces = list(chat.ask("What?", [picture(1)], stream=True))
    assert "".join(pieces).strip() == tiny.answer("What?", [picture(1)], max_new_tokens=8)
    assert chat.messages[-1].text == "".join(pieces).strip()


def test_who_stops_listening_keeps_what_was_heard(tiny):
    chat = tiny.chat(max_new_tokens=32)
    pieces = chat.ask("What?", stream=True)
    heard = next(pieces)
    pieces.close()
    assert [turn.text for turn in chat.messages] == ["What?", heard.strip()]


def test_undo_forgets_the_last_question_and_its_answer(tiny):
    chat = tiny.chat(max_new_tokens=4)
    first = chat.ask("One?")
    chat.ask("Two?")
    chat.undo()
    assert [turn.text for turn in chat.messages] == ["One?", first]
