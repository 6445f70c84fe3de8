"""What the page shows of what a model saw, and the conversation as a file to keep."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image

from mmlm.errors import MMLMError
from mmlm.features import Grid, Size
from mmlm.generation import GenerationSettings
from mmlm.generation.looking import Look
from mmlm.generation.session import Sessions
from mmlm.serving.chat_ui import ChatPage, build_page
from mmlm.serving.engine import Engine
from mmlm.serving.keepsake import as_page
from mmlm.serving.seen import draw_grid, draw_heat, tiles_of
from mmlm.serving.seen_ui import WHOLE, what_was_seen, words_of
from tests.tiny import compose_tiny, picture


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    tiny = compose_tiny(tmp_path_factory.mktemp("tiny"), image={"use": "letterbox"})
    return Engine(Sessions(tiny.model, tiny.processor), name="tiny")


@pytest.fixture
def history(engine, tmp_path):
    picture(1, 40, 80).save(tmp_path / "a.png")
    page = ChatPage([engine])
    _, history = page.ask({"text": "What?", "files": [str(tmp_path / "a.png")]}, [])
    settings = GenerationSettings(max_new_tokens=12)
    return list(page.answer([0], [history], settings, "anna"))[-1][0]


def test_tiles_lie_where_the_picture_is(engine):
    counter = engine.sessions.processor.image_processor.counter
    (tile,) = tiles_of(counter, Size(40, 80))
    assert tile.box == (0, -20, 80, 60)  # letterboxed: the square reaches beyond the picture
    assert tile.grid == Grid(1, 4, 4)


def test_the_map_is_warm_where_the_heat_is(engine):
    counter = engine.sessions.processor.image_processor.counter
    heat = np.zeros(16)
    heat[6] = 1.0  # second row, third column of four
    drawn = np.asarray(draw_heat(Image.new("RGB", (80, 40)), counter, heat)).astype(int)
    height, width = drawn.shape[:2]
    row, column = np.unravel_index(drawn[..., 0].argmax(), (height, width))
    # Its centre is at x = 50 and y = 10 of the picture.
    assert abs(column / width * 80 - 50) < 3
    assert abs(row / height * 40 - 10) < 3


def test_the_grid_says_how_many_tokens_there_are(engine):
    counter = engine.sessions.processor.image_processor.counter
    drawn, text = draw_grid(picture(1, 40, 80), counter)
    assert text == "16 tokens: 1 tile of 4 × 4"
    assert drawn.size == (768, 384)


def test_tokens_without_a_place_are_not_drawn_as_if_they_had_one():
    class Counter:
        side = Size(32, 32)

        @staticmethod
        def plan(size):
            from mmlm.images import LetterboxConfig

            return LetterboxConfig().plan(size, Counter.side)

        @staticmethod
        def grid_of_tile(size):
            return Grid(1, 1, 32)

    with pytest.raises(MMLMError, match="no place"):
        draw_heat(picture(), Counter, np.ones(32))
    assert draw_grid(picture(), Counter)[1] == "32 tokens: 1 tile of no places"


def test_tokens_are_joined_to_words():
    seen = Look(["A", " re", "d", " fox", "."], heat=None)  # pyright: ignore
    assert words_of(seen) == [("A", (0, 1)), ("red", (1, 3)), ("fox.", (3, 5))]


def test_a_look_gives_grid_and_map_of_every_picture_and_of_a_word(engine, history):
    pairs, names, text = what_was_seen(engine, history)
    assert len(pairs) == 2
    assert names[0] == WHOLE
    assert re.match(r"Share of attention on the picture: \d+ %\.", text)
    if len(names) > 1:
        assert what_was_seen(engine, history, names[1])[2] != ""
    drawn, names, _ = what_was_seen(engine, history[:-1])
    assert (len(drawn), names) == (1, [])


def test_without_a_picture_that_is_said(engine):
    with pytest.raises(MMLMError, match="No picture was shown"):
        what_was_seen(engine, [{"role": "user", "content": "What?"}])


def test_the_panel_stands_on_the_page_of_a_real_model(engine):
    assert "What the model saw" in str(build_page([engine]).get_config_file())


def test_a_kept_conversation_holds_its_pictures_and_escapes_its_words(history):
    history = [*history, {"role": "user", "content": "<script>x</script> & so?"}]
    page = as_page(history, "fox <b>")
    assert page.count("data:image/jpeg;base64,") == 1
    assert "<script>" not in page
    assert "&lt;script&gt;x&lt;/script&gt; &amp; so?" in page
    assert "<title>fox &lt;b&gt;</title>" in page
    assert "mmlm-facts" not in page
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_a_picture_that_is_gone_is_said(history):
    history[0]["content"] = [{"path": "gone.png"}]
    assert "no longer here" in as_page(history, "fox")
