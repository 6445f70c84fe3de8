"""Conversations keep text and images in their order, and read the shapes people write."""

from __future__ import annotations

import pytest

from mmlm.errors import DataError
from mmlm.messages import (
    ImagePart,
    Message,
    Text,
    assistant,
    from_openai,
    images_of,
    system,
    to_openai,
    user,
)


def test_a_user_turn_shows_its_images_before_the_question():
    turn = user("What is this?", images=["a.png", "b.png"])
    assert turn.images == ["a.png", "b.png"]
    assert turn.text == "What is this?"
    assert isinstance(turn.content[-1], Text)


def test_only_the_assistant_is_learnt_unless_a_turn_says_otherwise():
    assert [turn.learns for turn in (system("s"), user("u"), assistant("a"))] == [
        False,
        False,
        True,
    ]
    assert Message("user", (Text("u"),), learn=True).learns
    assert not Message("assistant", (Text("a"),), learn=False).learns


def test_images_of_a_conversation_are_in_reading_order():
    turns = [user("one", ["a"]), assistant("two"), user("three", ["b", "c"])]
    assert images_of(turns) == ["a", "b", "c"]


def test_openai_messages_survive_a_round_trip():
    turns = [
        system("Be brief."),
        Message("user", (Text("Left"), ImagePart("a.png"), Text("or right"), ImagePart("b.png"))),
        assistant("Left."),
    ]
    assert from_openai(to_openai(turns)) == turns


@pytest.mark.parametrize(
    "piece",
    [
        {"type": "image", "image": "a.png"},
        {"type": "image", "path": "a.png"},
        {"type": "image", "url": "a.png"},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image_url", "image_url": "a.png"},
    ],
    ids=lambda piece: "-".join(piece),
)
def test_every_way_to_write_an_image_is_understood(piece):
    (turn,) = from_openai([{"role": "user", "content": [piece]}])
    assert turn.images == ["a.png"]


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ("hello", r"messages\[0\]\.role must be one of system, user, assistant \(got 'hello'\)"),
        ({"role": "robot", "content": ""}, r"\(got 'robot'\)"),
        ({"role": "user"}, r"messages\[0\]\.content must be a string or a list \(got None\)"),
        (
            {"role": "user", "content": [{"type": "sound"}]},
            r"content\[0\] must be a text or an image",
        ),
        ({"role": "user", "content": ["hello"]}, r"content\[0\] must be a text or an image"),
    ],
)
def test_a_wrong_message_is_told_with_its_place(row, fault):
    with pytest.raises(DataError, match=fault):
        from_openai([row])
