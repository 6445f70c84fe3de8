"""A model behind another server: what that server is sent, and what is made of its answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient

from mmlm.errors import CheckpointError, MMLMError, UsageError
from mmlm.generation import GenerationSettings
from mmlm.images import open_image
from mmlm.messages import assistant, system, user
from mmlm.serving.behind import Behind
from mmlm.serving.engine import EngineGoneError
from mmlm.serving.openai_api import ApiLimits, build_api
from mmlm.serving.serve import EngineChoice, speakers_of
from mmlm.serving.vllm import VLLM, stock_folder, words_of
from tests.serving.fakes import FakeSpeaker
from tests.serving.live import free_port, serving, until
from tests.tiny import compose_tiny, picture

SETTINGS = GenerationSettings(max_new_tokens=9)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def there():
    """A server with a model that says what it was asked, and the model."""
    speaker = FakeSpeaker("there", words=3)
    with serving([speaker], keys=["secret"]) as address:
        yield Behind("here", address, model="there", key="secret", control=("<image>",)), speaker


def told(behind, messages, settings=SETTINGS, **options):
    pieces = list(behind.stream(messages, settings, **options))
    return "".join(piece.text for piece in pieces), pieces[-1].usage


def test_the_server_behind_gets_the_conversation_and_its_answer_comes_back(there):
    behind, speaker = there
    image = picture(1)
    talk = [system("Be brief."), user("What?", [image]), assistant("A cat."), user("And?")]
    settings = GenerationSettings(
        max_new_tokens=7, temperature=0.5, top_p=0.9, top_k=5, seed=3, stop=("!",),
        repetition_penalty=1.2,
    )  # fmt: skip
    text, usage = told(behind, talk, settings, as_json=True)
    assert text == "4 turns, 1 pictures: And? word0 word1 word2"
    assert (usage.num_tokens, usage.num_prompt_tokens, usage.finish_reason) == (8, 7, "stop")
    assert usage.first_token_seconds > 0
    (heard,) = speaker.heard
    assert [message.text for message in heard] == ["Be brief.", "What?", "A cat.", "And?"]
    assert open_image(heard[1].images[0]).tobytes() == image.tobytes()
    assert speaker.settings == [settings]
    assert speaker.forms == [True]


def test_control_words_of_the_tokenizer_arrive_broken_and_nothing_else_does(there):
    behind, speaker = there
    told(behind, [user("What is <image> in a < b?")])
    assert speaker.heard[0][0].text == "What is <\u2060image> in a < b?"


def test_what_the_server_behind_refuses_is_told_with_its_words(there):
    behind, _ = there
    with pytest.raises(MMLMError, match=r"refuses this conversation: .*letters"):
        told(behind, [user("a" * 300_000)])


def test_a_server_that_is_not_there_is_named():
    behind = Behind("here", f"http://127.0.0.1:{free_port()}")
    assert not behind.is_ready
    with pytest.raises(EngineGoneError, match="does not answer"):
        told(behind, [user("What?")])
    client = TestClient(build_api([behind]))
    assert client.get("/ready").json() == {"status": "loading"}
    body = {"model": "here", "messages": [{"role": "user", "content": "What?"}]}
    response = client.post("/v1/chat/completions", json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "engine")
    assert response.headers["retry-after"]
    with pytest.raises(UsageError, match="http://HOST:PORT"):
        Behind("here", "file:///etc/passwd")


def test_a_stop_and_a_closed_answer_end_generation_behind():
    slow = FakeSpeaker("slow", words=5000, pause=0.01)
    with serving([slow]) as address:
        behind, stop = Behind("slow", address), threading.Event()
        pieces = []
        for piece in behind.stream([user("Go.")], SETTINGS, stop):
            pieces.append(piece)
            if len(pieces) == 3:
                stop.set()
        assert pieces[-1].usage.finish_reason == "stopped"
        until(lambda: slow.num_closed == 1)
        pieces = behind.stream([user("Go.")], SETTINGS)
        next(pieces)
        assert not behind.is_idle
        pieces.close()
        until(lambda: slow.num_closed == 2)
        assert behind.is_idle
        assert slow.num_said < 5000


def test_token_ids_and_chances_come_through():
    stand_in = FastAPI()

    @stand_in.post("/v1/chat/completions")
    def chat(asked: dict):
        assert asked["return_tokens_as_token_ids"] is True
        token = {
            "token": "token_id:65",
            "logprob": -0.5,
            "top_logprobs": [
                {"token": "token_id:65", "logprob": -0.5},
                {"token": "token_id:66", "logprob": -1.5},
            ],
        }
        rows = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]},
                {"choices": [{"delta": {"content": "A"}, "logprobs": {"content": [token]}}]},
                {"choices": [{"delta": {}, "finish_reason": "length"}]}]  # fmt: skip
        lines = [f"data: {json.dumps(row)}\n\n" for row in rows] + ["data: [DONE]\n\n"]
        return StreamingResponse(iter(lines), media_type="text/event-stream")

    with running(stand_in) as address:
        pieces = list(Behind("here", address).stream([user("What?")], SETTINGS, num_top=2))
    assert (pieces[0].text, pieces[0].token_id, pieces[0].logprob) == ("A", 65, -0.5)
    assert pieces[0].top == ((65, -0.5), (66, -1.5))
    assert pieces[-1].usage.finish_reason == "length"


@contextmanager
def running(app):
    port = free_port()
    config = uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("stock")
    compose_tiny(place / "parts").save(place / "model")
    return place / "model"


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "vllm"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.serving.stand_in "$@"\n')
    path.chmod(0o755)
    return str(path)


def test_our_front_stands_before_a_vllm_process(folder, program, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{Path(program).parent}{os.pathsep}{os.environ['PATH']}")
    choice = EngineChoice(kind="vllm", options=("--max-model-len", "1024"))
    with speakers_of([folder], choice) as speakers, serving(speakers) as address:
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            answer = client.chat.completions.create(
                model="model", messages=[{"role": "user", "content": "What <|im_end|>?"}]
            )
        assert answer.choices[0].message.content == "1 turns, 0 pictures: What <\u2060|im_end|>?"
    assert not speakers[0].is_ready  # the process ended with the context


@pytest.mark.slow
def test_a_vllm_that_ends_at_once_is_told(folder, program, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    engine = VLLM(folder, program=program, options=["--max-model-len", "0"])
    with pytest.raises(CheckpointError, match="exit code 1"):
        engine.start(120)


@pytest.mark.slow
def test_a_front_that_is_told_to_end_while_its_engine_loads_ends_the_engine(folder, tmp_path):
    pid = tmp_path / "pid"
    (tmp_path / "vllm").write_text(f"#!/bin/sh\necho $$ > {pid}\nexec sleep 600\n")
    (tmp_path / "vllm").chmod(0o755)
    command = ["serve", str(folder), "--engine", "vllm", "--port", str(free_port())]
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    front = subprocess.Popen(
        [sys.executable, "-m", "mmlm", *command], env={**os.environ, "PATH": path}
    )
    until(lambda: pid.exists() and pid.read_text().strip(), 300)
    engine = int(pid.read_text())
    front.terminate()
    assert front.wait(60) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(engine, 0)


def test_vllm_needs_its_program_and_a_stock_folder(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="not on the path"):
        VLLM(folder)
    compose_tiny(tmp_path / "parts", "patches").save(tmp_path / "own")
    with pytest.raises(UsageError, match="own class"):
        stock_folder(tmp_path / "own")
    (tmp_path / "half").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        stock_folder(tmp_path / "half")
    assert {"<image>", "<|im_end|>"} <= set(words_of(folder)["control"])


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"kind": "vllm", "bits": 4}, "--engine-options"),
        ({"url": "http://127.0.0.1:1"}, "belong to --engine vllm"),
        ({"kind": "vllm", "url": "http://127.0.0.1:1"}, "One model"),
    ],
)
def test_words_that_do_not_fit_the_engine_are_refused(choice, words):
    with pytest.raises(UsageError, match=words), speakers_of(["a", "b"], EngineChoice(**choice)):
        pass


def test_the_front_limits_pictures_before_the_server_behind_sees_any(there):
    behind, speaker = there
    client = TestClient(build_api([behind], limits=ApiLimits(max_pixels=100)))
    url = "data:image/png;base64,aGVsbG8="
    body = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": url}]}]}
    assert client.post("/v1/chat/completions", json=body).status_code == 400
    assert speaker.heard == []
