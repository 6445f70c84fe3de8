"""What goes wrong while serving is told to whom it concerns, and the others are answered."""

from __future__ import annotations

import io
import socket
import threading
from base64 import b64encode

import pytest
import torch
from fastapi.testclient import TestClient

from mmlm.cli import run
from mmlm.errors import CheckpointError, UsageError
from mmlm.generation import GenerationSettings
from mmlm.generation.session import Sessions
from mmlm.messages import user
from mmlm.serving.chat_ui import ChatPage, build_page, page_options, serve_page
from mmlm.serving.engine import Engine
from mmlm.serving.openai_api import build_api
from mmlm.serving.ports import check_port, free_port
from tests.serving.fakes import FakeSpeaker
from tests.tiny import compose_tiny, picture

SETTINGS = GenerationSettings(max_new_tokens=8)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return compose_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def engine(tiny):
    return Engine(Sessions(tiny.model, tiny.processor), name="tiny")


def body(text, *images, **options):
    parts = [{"type": "text", "text": text}]
    for image in images:
        file = io.BytesIO()
        image.save(file, "PNG")
        url = "data:image/png;base64," + b64encode(file.getvalue()).decode()
        parts.append({"type": "image_url", "image_url": {"url": url}})
    content = {"role": "user", "content": parts}
    return {"model": "tiny", "max_tokens": 8, "messages": [content], **options}


@pytest.fixture
def small_memory(tiny):
    """Let the model run out of memory on prompts of more than 200 tokens."""

    def refuse(module, args, kwargs):
        states = args[0] if args else kwargs["hidden_states"]
        if states.shape[1] > 200:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    handle = tiny.model.model.language.layers[1].register_forward_pre_hook(refuse, with_kwargs=True)
    yield
    handle.remove()


@pytest.mark.parametrize("stream", [False, True])
def test_out_of_memory_is_told_to_one_client_and_the_others_are_answered(
    tiny, engine, small_memory, stream
):
    client = TestClient(build_api([engine]))
    alone = Sessions(tiny.model, tiny.processor).answer([user("What?")], SETTINGS)[0]
    said: list = []

    def ask(text):
        said.append(client.post("/v1/chat/completions", json=body(text)))

    others = [threading.Thread(target=ask, args=("What?",)) for _ in range(3)]
    for thread in others:
        thread.start()
    response = client.post("/v1/chat/completions", json=body("a" * 400, stream=stream))
    for thread in others:
        thread.join()
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "out_of_memory"
    assert "ran out of memory on this conversation" in response.json()["error"]["message"]
    assert "CUDA" not in response.text
    assert [r.json()["choices"][0]["message"]["content"] for r in said] == [alone] * 3
    assert engine.is_idle


def test_out_of_memory_is_said_under_the_question_on_the_page(engine, small_memory):
    page = ChatPage([engine])
    _, history = page.ask({"text": "a" * 400}, [])
    shown = list(page.answer([0], [history], SETTINGS, "anna"))[-1][0]
    assert "ran out of memory" in shown[-1]["content"][1]


def test_a_model_that_ends_in_nan_says_so_and_the_server_lives(tiny, engine):
    client = TestClient(build_api([engine]), raise_server_exceptions=False)
    weight = tiny.model.lm_head.weight
    kept = weight.data.clone()
    weight.data.fill_(float("nan"))
    try:
        response = client.post("/v1/chat/completions", json=body("What?", picture(1)))
    finally:
        weight.data.copy_(kept)
    assert response.status_code == 500
    assert "not finite" in response.json()["error"]["message"]
    assert response.json()["error"]["code"] == "model"
    assert client.post("/v1/chat/completions", json=body("What?")).status_code == 200


def test_a_taken_port_is_named_before_a_model_is_loaded():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(UsageError, match=rf"page cannot listen on 127\.0\.0\.1:{port}"):
            serve_page(["no/model"], port=port)
        with pytest.raises(UsageError, match="Choose another --port"):
            check_port("127.0.0.1", port, "API")
    with pytest.raises(UsageError, match="1 to 65535"):
        check_port("127.0.0.1", 70000, "API")


def test_a_second_page_on_the_port_of_the_first_is_refused_and_the_first_goes_on():
    blocks, port = build_page([FakeSpeaker()]), free_port()
    blocks.launch(
        server_name="127.0.0.1", server_port=port, quiet=True, prevent_thread_lock=True,
        **page_options(),
    )  # fmt: skip
    try:
        with pytest.raises(UsageError, match="cannot listen"):
            serve_page(["no/model"], port=port)
        with socket.create_connection(("127.0.0.1", port), 5):
            pass
    finally:
        blocks.close()


@pytest.mark.parametrize("command", ["app", "serve", "chat"])
def test_a_half_folder_is_named_with_what_is_missing(command, tiny, tmp_path, capsys):
    folder = tmp_path / "half"
    tiny.save(folder)
    (folder / "model.safetensors").unlink()
    words = [command, str(folder)]
    if command != "chat":
        words += ["--port", str(free_port())]
    assert run(words) == 1
    told = capsys.readouterr().err
    assert "half" in told
    assert "Traceback" not in told
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError):
        Engine.load(folder)


@pytest.mark.parametrize("command", ["app", "serve", "chat"])
def test_a_model_that_does_not_exist_is_named(command, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    words = [] if command == "chat" else ["--port", str(free_port())]
    assert run([command, "somebody/no-such-model", *words]) == 1
    told = capsys.readouterr().err
    assert "'somebody/no-such-model' is no folder here, and the Hub does not give it" in told
    assert "Traceback" not in told
