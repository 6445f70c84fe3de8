from __future__ import annotations

import pytest
from PIL import Image

from mmlm.errors import MMLMError
from mmlm.generation.session import Usage
from mmlm.messages import ImagePart, Text
from mmlm.serving.turns import (
    WORDLESS_QUESTION,
    PageLimits,
    answered,
    asked,
    cut_answer,
    cut_question,
    edited,
    facts_line,
    messages_of,
    words_of_fault,
)
from tests.images.test_decode import promised_png

LIMITS = PageLimits(max_pixels=100 * 100, max_images=2, max_letters=50)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "fox.png"
    Image.new("RGB", (20, 10)).save(path)
    return str(path)


def shown_by_gradio(turns):
    """Return turns as Gradio hands them back after they were shown."""
    shown = []
    for turn in turns:
        content = turn["content"] if isinstance(turn["content"], list) else [turn["content"]]
        parts = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "file", "file": {"path": part["path"]}, "alt_text": None}
            for part in content
        ]
        shown.append({"role": turn["role"], "content": parts, "metadata": None, "options": None})
    return shown


def test_a_question_with_pictures_becomes_one_turn_for_the_model(image):
    turns = asked({"text": " What? ", "files": [image, {"path": image}]}, [], LIMITS)
    for history in (turns, shown_by_gradio(turns)):
        (message,) = messages_of(history)
        assert message.role == "user"
        assert [type(part) for part in message.content] == [ImagePart, ImagePart, Text]
        assert message.images == [image, image]
        assert message.text == "What?"


def test_the_line_of_facts_never_reaches_the_model(image):
    history = [*asked({"text": "What?"}, [], LIMITS), answered("A fox.", "<span>7 tokens</span>")]
    for shown in (history, shown_by_gradio(history)):
        assert [message.text for message in messages_of(shown)] == ["What?", "A fox."]


def test_a_picture_without_words_gets_a_question_that_everybody_sees(image):
    turns = asked({"text": "", "files": [image]}, [], LIMITS)
    assert turns[-1]["content"] == WORDLESS_QUESTION


def test_what_cannot_be_sent_is_said_in_words(image, tmp_path):
    big, broken = tmp_path / "big.png", tmp_path / "broken.png"
    Image.new("1", (4000, 1000)).save(big)
    broken.write_bytes(b"hello")
    cases = [
        ({"text": " ", "files": []}, "nothing to answer"),
        (None, "nothing to answer"),
        ({"text": "a" * 51}, "51 letters; the limit is 50"),
        ({"text": "", "files": [image] * 3}, "3 pictures; the limit is 2"),
        ({"text": "", "files": [str(big)]}, "^big.png has 4 megapixels, the limit is 0"),
        ({"text": "", "files": [str(broken)]}, "^broken.png is not a picture"),
    ]
    for box, words in cases:
        with pytest.raises(MMLMError, match=words) as caught:
            asked(box, [], LIMITS)
        assert str(tmp_path) not in str(caught.value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_that_is_too_large_is_told_its_size_and_the_limit(tmp_path):
    (tmp_path / "big.png").write_bytes(promised_png(12_000, 10_000))
    with pytest.raises(MMLMError, match=r"^big\.png has 120 megapixels, the limit is 40\."):
        asked({"text": "", "files": [str(tmp_path / "big.png")]}, [], PageLimits())


def test_pictures_of_the_whole_conversation_are_counted(image):
    history = [*asked({"text": "", "files": [image, image]}, [], LIMITS), answered("Foxes.")]
    with pytest.raises(MMLMError, match="3 pictures"):
        asked({"text": "", "files": [image]}, history, LIMITS)


def test_taking_back_gives_the_question_with_its_pictures(image):
    first = [*asked({"text": "One?", "files": [image]}, [], LIMITS), answered("1", "facts")]
    history = [*first, *asked({"text": "Two?", "files": [image]}, [], LIMITS), answered("2")]
    for shown in (history, shown_by_gradio(history)):
        kept, box = cut_question(shown)
        assert len(kept) == len(first)
        assert box == {"text": "Two?", "files": [image]}
        assert cut_question(cut_question(kept)[0]) == ([], {"text": "", "files": []})


def test_answering_again_takes_only_the_answer_away(image):
    history = [*asked({"text": "One?", "files": [image]}, [], LIMITS), answered("1", "facts")]
    assert cut_answer(history) == history[:-1]


def test_editing_keeps_what_came_before_and_forgets_what_came_after(image):
    first = asked({"text": "One?", "files": [image]}, [], LIMITS)
    history = [*first, answered("1"), {"role": "user", "content": "Two?"}, answered("2")]
    for shown in (history, shown_by_gradio(history)):
        messages = messages_of(edited(shown, 1, " Uno? "))
        assert [message.text for message in messages] == ["Uno?"]
        assert messages[0].images == [image]
        assert [m.text for m in messages_of(edited(shown, 3, "Due?"))] == ["One?", "1", "Due?"]


def test_the_facts_say_what_an_answer_cost_and_how_it_ended():
    usage = Usage(
        num_prompt_tokens=1234, num_image_tokens=196, num_cached_tokens=1000, num_tokens=9,
        first_token_seconds=0.05, seconds=0.45, finish_reason="length",
    )  # fmt: skip
    line = facts_line(usage)
    assert "9 tokens · first after 50 ms · 20 per second" in line
    assert "read 1,234 (196 of images), 1,000 remembered" in line
    assert "cut at the length limit" in line
    assert "stopped" in facts_line(Usage(num_tokens=1))


def test_a_fault_is_written_so_that_it_cannot_be_html():
    line = facts_line(Usage(), "<b>no & yes</b>")
    assert "<b>" not in line
    assert words_of_fault(line) == "<b>no & yes</b>"
