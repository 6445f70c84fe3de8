"""A server that really listens, asked by the `openai` package as it comes."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from mmlm.generation import GenerationSettings
from mmlm.generation.session import Sessions
from mmlm.messages import user
from mmlm.serving.engine import Engine
from tests.serving.live import free_port, long_question, serving, until
from tests.tiny import compose_tiny, picture


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return compose_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def engines(tiny):
    other = compose_tiny_other(tiny)
    return [Engine(Sessions(tiny.model, tiny.processor), name="one"), other]


def compose_tiny_other(tiny):
    return Engine(Sessions(tiny.model, tiny.processor), name="two")


@pytest.fixture(scope="module")
def address(engines):
    with serving(engines) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def shown(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url, "detail": "low"}}


def asked(text, *images):
    parts = [*map(shown, images), {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def alone(tiny, text, *images, **settings):
    talk = [user(text, images)]
    return Sessions(tiny.model, tiny.processor).answer(talk, GenerationSettings(**settings))


def test_the_openai_package_lists_models_and_gets_the_models_own_answer(tiny, client):
    assert [model.id for model in client.models.list()] == ["one", "two"]
    told, usage = alone(tiny, "What?", picture(1), picture(2), max_new_tokens=12)
    for name in ("one", "two"):
        answer = client.chat.completions.create(
            model=name, messages=asked("What?", picture(1), picture(2)), max_tokens=12
        )
        assert answer.choices[0].message.content == told
        assert answer.choices[0].finish_reason == usage.finish_reason
        assert answer.usage.prompt_tokens == usage.num_prompt_tokens
        assert answer.model == name


def test_the_openai_package_streams(tiny, client):
    told, usage = alone(tiny, "What?", picture(3), max_new_tokens=12)
    chunks = list(
        client.chat.completions.create(
            model="one", messages=asked("What?", picture(3)), max_completion_tokens=12,
            stream=True, stream_options={"include_usage": True}, logprobs=True, top_logprobs=2,
        )
    )  # fmt: skip
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text.rstrip() == told
    assert chunks[-2].choices[0].finish_reason == usage.finish_reason
    assert chunks[-1].usage.completion_tokens == usage.num_tokens
    assert len(chunks[1].choices[0].logprobs.content[0].top_logprobs) == 2


def test_seed_stop_and_n_mean_what_they_say(client):
    def say(**options):
        answer = client.chat.completions.create(
            model="one", messages=asked("What?"), max_tokens=16, **options
        )
        return [choice.message.content for choice in answer.choices]

    first = say(temperature=1.0, seed=1, n=2)
    assert first == say(temperature=1.0, seed=1, n=2)
    assert first[0] != first[1]
    whole = say()[0]
    letter = next(letter for letter in whole[1:] if letter.isalnum())
    assert say(stop=[letter])[0] == whole[: whole.index(letter)].strip()


def test_json_is_json_from_a_model_that_knows_none(client):
    answer = client.chat.completions.create(
        model="one", messages=asked("As JSON, please."), max_tokens=500, temperature=1.5, seed=3,
        response_format={"type": "json_object"},
    )  # fmt: skip
    choice = answer.choices[0]
    assert choice.message.content.startswith("{")
    assert choice.finish_reason == "length" or isinstance(json.loads(choice.message.content), dict)


def test_errors_reach_the_openai_package_as_its_own(client):
    with pytest.raises(openai.NotFoundError, match="Known: one, two"):
        client.chat.completions.create(model="three", messages=asked("What?"))
    with pytest.raises(openai.BadRequestError, match="json_schema"):
        client.chat.completions.create(
            model="one", messages=asked("What?"),
            response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": {}}},
        )  # fmt: skip


def test_clients_at_the_same_time_get_what_they_would_get_alone(tiny, client):
    def ask(number):
        answer = client.chat.completions.create(
            model="one", messages=asked(f"{number}?", picture(number)), max_tokens=24
        )
        return answer.choices[0].message.content

    with ThreadPoolExecutor(6) as pool:
        told = list(pool.map(ask, range(6)))
    assert told == [alone(tiny, f"{n}?", picture(n), max_new_tokens=24)[0] for n in range(6)]


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_a_client_that_leaves_ends_generation_within_one_token(tiny, engines, address, stream):
    text, image = long_question(tiny)
    steps = []
    handle = tiny.model.register_forward_hook(lambda *_: steps.append(time.sleep(0.01)))
    body = {"model": "one", "messages": asked(text, image), "stream": stream, "max_tokens": 900}
    try:
        with httpx.Client(timeout=httpx.Timeout(30, read=0.4 if not stream else 30)) as client:
            if stream:
                with client.stream("POST", f"{address}/v1/chat/completions", json=body) as response:
                    next(response.iter_bytes())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post(f"{address}/v1/chat/completions", json=body)
        until(lambda: engines[0].is_idle)
        assert 0 < len(steps) < 800
        ended = len(steps)
        time.sleep(0.1)
        assert len(steps) == ended
    finally:
        handle.remove()


def test_an_answer_that_has_begun_is_ended_before_the_process_is(tmp_path):
    tiny = compose_tiny(tmp_path / "parts")
    tiny.save(tmp_path / "model")
    text, image = long_question(tiny, 400)
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "mmlm", "serve", str(tmp_path / "model"), "--port", str(port)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"

    def ready():
        assert process.poll() is None, process.stdout.read()
        try:
            return httpx.get(f"{address}/ready").status_code == 200
        except httpx.TransportError:
            return False

    until(ready, 300)
    try:
        heard, statuses = _stop_in_the_middle(process, address, asked(text, image))
    finally:
        process.kill() if process.poll() is None else None
    assert process.returncode == 0
    assert heard[-1].finish_reason == "length"
    assert 503 in statuses


def _stop_in_the_middle(process, address, messages):
    """Ask for a long answer and send SIGTERM while it comes; returns it, and what /ready said."""
    settings: dict = {"model": "model", "max_tokens": 401, "stream": True}
    heard, statuses = [], []

    def listen():
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            for chunk in client.chat.completions.create(messages=messages, **settings):
                heard.append(chunk.choices[0])

    thread = threading.Thread(target=listen)
    thread.start()
    until(lambda: len(heard) > 2, 120)
    process.send_signal(signal.SIGTERM)
    while process.poll() is None:
        try:
            statuses.append(httpx.get(f"{address}/ready").status_code)
        except httpx.TransportError:
            break
        time.sleep(0.02)
    thread.join(120)
    process.wait(120)
    return heard, statuses
