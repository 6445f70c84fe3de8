"""Conversations that can be opened again by an address."""

from __future__ import annotations

from mmlm.serving.links import Links
from mmlm.serving.turns import answered


def talk(*words):
    return [{"role": "user", "content": words[0]}, *(answered(word) for word in words[1:])]


def test_a_link_gives_a_copy_that_nobody_changes():
    links, said = Links(), [talk("What?", "A cat.")]
    name = links.put(said)
    said[0].append({"role": "user", "content": "And?"})
    links.get(name)[0].clear()
    assert links.get(name) == [talk("What?", "A cat.")]


def test_names_cannot_be_guessed_and_unknown_ones_give_nothing():
    links = Links()
    first, second = links.put([talk("a")]), links.put([talk("a")])
    assert first != second
    assert len(first) >= 20
    assert links.get("") is links.get(first[:-1]) is None


def test_links_end_after_some_hours_and_the_oldest_leave_first():
    now = [0.0]
    links = Links(most=2, seconds=10.0, clock=lambda: now[0])
    names = [links.put([talk(str(number))]) for number in range(3)]
    assert [links.get(name) is None for name in names] == [True, False, False]
    now[0] = 11.0
    assert links.get(names[2]) is None


def test_a_conversation_whose_picture_was_deleted_is_not_opened(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"")
    links = Links()
    shown = [{"role": "user", "content": [{"path": str(path)}]}, *talk("What?", "A cat.")]
    name = links.put([shown])
    assert links.get(name) == [shown]
    path.unlink()
    assert links.get(name) is None
