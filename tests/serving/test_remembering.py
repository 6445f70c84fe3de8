"""One memory for page and API: a turn on either goes on from what the other has computed."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from mmlm.generation import GenerationSettings
from mmlm.generation.session import Sessions
from mmlm.messages import user
from mmlm.serving.chat_ui import ChatPage
from mmlm.serving.engine import Engine
from mmlm.serving.openai_api import build_api
from mmlm.serving.turns import messages_of
from tests.tiny import compose_tiny, picture

SETTINGS = GenerationSettings(max_new_tokens=8)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return compose_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def engine(tiny):
    return Engine(Sessions(tiny.model, tiny.processor), name="tiny")


@pytest.fixture
def files(tmp_path):
    for number in range(3):
        picture(number).save(tmp_path / f"{number}.png")
    return [tmp_path / f"{number}.png" for number in range(3)]


def as_sent(talk):
    """Write a conversation as clients of the API do."""
    sent = []
    for message in talk:
        parts: list = [{"type": "text", "text": message.text}]
        for image in reversed(message.images):
            data = base64.b64encode(Path(image).read_bytes()).decode()
            url = {"url": f"data:image/png;base64,{data}"}
            parts.insert(0, {"type": "image_url", "image_url": url})
        sent.append({"role": message.role, "content": parts})
    return sent


def test_words_and_pictures_in_any_order_over_turns_are_read_once_on_page_and_api(
    tiny, engine, files
):
    page, api, history = ChatPage([engine]), TestClient(build_api([engine])), []
    turns = [("Hello?", []), ("What?", files[:2]), ("And?", []), ("This?", files[2:])]
    for number, (text, shown) in enumerate(turns):
        _, history = page.ask({"text": text, "files": list(map(str, shown))}, history)
        talk = messages_of(history)
        alone = Sessions(tiny.model, tiny.processor).answer(talk, SETTINGS)[0]
        body = {"messages": as_sent(talk), "max_tokens": 8}
        told = api.post("/v1/chat/completions", json=body).json()
        assert told["choices"][0]["message"]["content"] == alone
        cached = told["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert (cached > 0) == (number > 0)
        # The page asks what the API was asked: all but one token of it is known already.
        history = list(page.answer([0], [history], SETTINGS, "anna"))[-1][0]
        assert history[-1]["content"][0] == alone
        known = told["usage"]["prompt_tokens"] - 1
        assert f"{known:,} remembered" in history[-1]["content"][1]
    assert messages_of(history)[0] == user("Hello?")
