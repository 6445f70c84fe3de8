"""Our front before a real vLLM, which needs the program `vllm` on the path: minutes on a CPU.

What our front sends and makes of answers is asked more closely, and in seconds, in `test_behind`.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest
from fastapi.testclient import TestClient
from gradio_client import Client, handle_file

import mmlm
from mmlm.generation.session import Sessions
from mmlm.serving.engine import Engine
from mmlm.serving.openai_api import build_api
from tests import tiny, vllm_on_cpu
from tests.serving.live import free_port, until
from tests.serving.test_live import asked

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("vllm") is None, reason="needs the program vllm"),
]
START_SECONDS = float(os.environ.get("MMLM_VLLM_SECONDS", "1800"))
SMALL = {
    **vllm_on_cpu.SETTINGS, "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(Path(__file__).parents[2]),
}  # fmt: skip
WORDS = "--dtype float32 --enforce-eager --max-model-len 512 --max-num-seqs 4"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return vllm_on_cpu.save_stock(tmp_path_factory.mktemp("stock"))


@pytest.fixture(scope="module")
def front(folder):
    """`mmlm serve --engine vllm`, as a user starts it; gives its process and its address."""
    port = free_port()
    command = ["serve", str(folder), "--port", str(port), "--ui", "--engine", "vllm"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mmlm", *command, "--engine-options", WORDS],
        env={**os.environ, **SMALL},
    )
    address = f"http://127.0.0.1:{port}"

    def is_ready():
        assert process.poll() is None, "the front ended"
        time.sleep(1)
        try:
            return httpx.get(f"{address}/ready", timeout=10).status_code == 200
        except httpx.TransportError:
            return False

    try:
        until(is_ready, START_SECONDS)
        yield process, address
    finally:
        process.terminate() if process.poll() is None else None
        process.wait(120)


@pytest.fixture(scope="module")
def local(folder):
    """The same folder in this process, asked in the same words."""
    assistant = mmlm.load(folder)
    sessions = Sessions(assistant.model, assistant.processor)
    return TestClient(build_api([Engine(sessions, name="model")]))


def body(text, *images, **settings):
    return {"model": "model", "messages": asked(text, *images), "max_tokens": 12, **settings}


def test_vllm_behind_our_front_gives_the_tokens_of_the_local_engine(front, local):
    _, address = front
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        for images in ([tiny.picture(1)], [tiny.picture(2), tiny.picture(3)], []):
            words = body("What?", *images, logprobs=True, top_logprobs=2)
            told = client.chat.completions.create(**words, timeout=600)
            mine = local.post("/v1/chat/completions", json=words).json()
            theirs = told.choices[0].logprobs.content
            ours = mine["choices"][0]["logprobs"]["content"]
            assert [token.bytes for token in theirs] == [token["bytes"] for token in ours]
            assert [token.logprob for token in theirs] == pytest.approx(
                [token["logprob"] for token in ours], abs=1e-3
            )
            assert told.usage.prompt_tokens == mine["usage"]["prompt_tokens"]
            assert told.usage.completion_tokens == mine["usage"]["completion_tokens"]
            assert told.choices[0].finish_reason == mine["choices"][0]["finish_reason"]


def test_vllm_behind_our_front_streams(front):
    _, address = front
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        chunks = list(
            client.chat.completions.create(
                **body("What?", tiny.picture(1)), stream=True, timeout=600,
                stream_options={"include_usage": True},
            )
        )  # fmt: skip
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")
    assert chunks[-1].usage.completion_tokens > 0


def test_what_strangers_send_is_checked_before_vllm_sees_it(front):
    _, address = front
    url = "data:image/png;base64,aGVsbG8="
    broken = body("What?")
    broken["messages"][0]["content"].append({"type": "image_url", "image_url": {"url": url}})
    with httpx.Client(base_url=address, timeout=600) as client:
        refused = client.post("/v1/chat/completions", json=broken)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "image")
        control = client.post("/v1/chat/completions", json=body("What is <image> and <|im_end|>?"))
        assert control.status_code == 200  # vLLM would look for a second picture
        long = client.post("/v1/chat/completions", json=body("a" * 2000))
        assert long.status_code == 400  # vLLM's own limit, in its own words
        assert "512" in long.json()["error"]["message"]


def test_the_page_stands_before_vllm(front, local, tmp_path):
    _, address = front
    tiny.picture(1).save(tmp_path / "a.png")
    message = {"text": "What?", "files": [handle_file(tmp_path / "a.png")]}
    told = Client(address, verbose=False).predict(message, max_new_tokens=12, api_name="/chat")
    mine = local.post("/v1/chat/completions", json=body("What?", tiny.picture(1))).json()
    # A letter that the end cuts in half is told by one and kept back by the other.
    whole = mine["choices"][0]["message"]["content"].rstrip("\ufffd")
    assert told.rstrip("\ufffd") == whole


def test_a_client_that_leaves_and_a_front_that_ends_leave_vllm_idle_and_gone(front):
    process, address = front
    words = body("What?", tiny.picture(1), stream=True)
    with (
        httpx.Client(timeout=600) as client,
        client.stream("POST", f"{address}/v1/chat/completions", json=words) as response,
    ):
        next(response.iter_bytes())
    engine = int(subprocess.check_output(["pgrep", "-o", "-P", str(process.pid)], text=True))
    process.send_signal(signal.SIGTERM)
    assert process.wait(180) == 0
    with pytest.raises(ProcessLookupError):
        os.kill(engine, 0)
