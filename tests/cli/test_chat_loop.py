from __future__ import annotations

import io
import json
import re

import pytest
from PIL import Image

from mmlm.cli.chat import Terminal
from mmlm.cli.chat_loop import blocks, save_talk, shows_colours
from mmlm.errors import UsageError
from mmlm.messages import assistant, user

TALK = [user("What <image>?", ["a.png"]), assistant("Ein Fuchs 🦊.")]


def test_a_picture_is_drawn_with_two_pixels_in_each_place():
    image = Image.new("RGB", (2, 2), "white")
    image.putpixel((0, 1), (255, 0, 0))
    lines = blocks(image, columns=2, rows=1).split("\n")
    assert lines == [
        "\x1b[38;2;255;255;255m\x1b[48;2;255;0;0m▀"
        "\x1b[38;2;255;255;255m\x1b[48;2;255;255;255m▀\x1b[0m"
    ]


@pytest.mark.parametrize("size", [(4000, 30), (30, 4000), (1, 1), (640, 480)])
def test_a_drawing_fits_and_keeps_its_shape(size):
    lines = blocks(Image.new("RGB", size), columns=40, rows=20).split("\n")
    widths = {line.count("▀") for line in lines}
    assert len(widths) == 1
    assert 1 <= widths.pop() <= 40
    assert 1 <= len(lines) <= 20


def test_colours_are_for_people_whose_terminal_has_them():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    assert shows_colours(Terminal(), {"COLORTERM": "truecolor"})
    assert not shows_colours(Terminal(), {})
    assert not shows_colours(Terminal(), {"COLORTERM": "truecolor", "NO_COLOR": "1"})
    assert not shows_colours(io.StringIO(), {"COLORTERM": "truecolor"})


def test_a_saved_talk_can_be_read_by_people_and_programs(tmp_path):
    save_talk(TALK, tmp_path / "talk.json")
    rows = json.loads((tmp_path / "talk.json").read_text("utf-8"))
    assert rows[0]["content"] == [
        {"type": "image", "image": "a.png"}, {"type": "text", "text": "What <image>?"},
    ]  # fmt: skip
    save_talk(TALK, tmp_path / "talk.md")
    page = (tmp_path / "talk.md").read_text("utf-8")
    assert re.sub(r"\s+", " ", page).strip() == (
        "**You** ![picture](a.png) What <image>? **Model** Ein Fuchs 🦊."
    )


def test_a_saved_talk_never_covers_another_file(tmp_path):
    (tmp_path / "talk.md").write_text("mine")
    for name, words in (
        ("talk.md", "there already"),
        ("talk.txt", "ends in"),
        ("no/t.md", "written"),
    ):
        with pytest.raises(UsageError, match=words):
            save_talk(TALK, tmp_path / name)
    assert (tmp_path / "talk.md").read_text() == "mine"


def test_save_is_a_word_of_the_terminal(tmp_path, capsys):
    class Chat:
        messages = TALK

    terminal = Terminal(Chat())  # pyright: ignore[reportArgumentType]
    assert terminal.take(f"/save '{tmp_path}/my talk.md'")
    assert "my talk.md" in capsys.readouterr().out
    with pytest.raises(UsageError, match="one file"):
        terminal.take("/save")
