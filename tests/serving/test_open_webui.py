"""open-webui as it comes, before our API: it lists the model, shows a picture and gets the answer.

Needs the package `open-webui`, a large one, in an environment of its own beside MMLM. It starts
as a process, so that what it sets up stays there.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import subprocess
import sys
import time

import httpx
import pytest

from mmlm.generation import GenerationSettings
from mmlm.generation.session import Sessions
from mmlm.messages import user
from mmlm.serving.engine import Engine
from tests.serving.live import free_port, serving, until
from tests.tiny import compose_tiny, picture

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("open_webui") is None, reason="needs the package open-webui"
    ),
]
START_SECONDS = 900


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return compose_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def address(tiny):
    engine = Engine(Sessions(tiny.model, tiny.processor), name="tiny")
    with serving([engine], keys=["a key"]) as address:
        yield address


@pytest.fixture(scope="module")
def visitor(address, tmp_path_factory):
    """Somebody who is signed in to an open-webui that knows our address, our key, and no more."""
    folder, port = tmp_path_factory.mktemp("webui"), free_port()
    settings = {
        "OPENAI_API_BASE_URL": f"{address}/v1", "OPENAI_API_KEY": "a key",
        "ENABLE_OLLAMA_API": "False", "WEBUI_AUTH": "False", "WEBUI_SECRET_KEY": "test",
        "DATA_DIR": str(folder), "OFFLINE_MODE": "True", "HF_HUB_OFFLINE": "1",
        "RAG_EMBEDDING_ENGINE": "openai", "BYPASS_EMBEDDING_AND_RETRIEVAL": "True",
        "SCARF_NO_ANALYTICS": "true", "DO_NOT_TRACK": "true", "ANONYMIZED_TELEMETRY": "false",
    }  # fmt: skip
    words = ["--host", "127.0.0.1", "--port", str(port)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", "from open_webui import app; app()", "serve", *words],
            env={**os.environ, **settings}, cwd=folder, stdout=log, stderr=log,
        )  # fmt: skip
    webui = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False)

    def is_ready():
        assert process.poll() is None, (folder / "log").read_text()[-3000:]
        time.sleep(1)
        try:
            return webui.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    try:
        until(is_ready, START_SECONDS)
        token = webui.post("/api/v1/auths/signin", json={"email": "", "password": ""}).json()
        webui.headers["authorization"] = f"Bearer {token['token']}"
        yield webui
    finally:
        webui.close()
        process.terminate()
        process.wait(180)


def body(text, image, **options):
    file = io.BytesIO()
    image.save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": text},
    ]
    return {"model": "tiny", "messages": [{"role": "user", "content": parts}], **options}


def test_open_webui_lists_the_model_and_gets_its_own_answer_about_a_picture(tiny, visitor):
    listed = visitor.get("/api/models").json()["data"]
    assert "tiny" in [model["id"] for model in listed]
    settings = GenerationSettings(max_new_tokens=12)
    expected = Sessions(tiny.model, tiny.processor).answer([user("?", [picture(1)])], settings)[0]
    words = body("?", picture(1), max_tokens=12, temperature=0)
    whole = visitor.post("/api/chat/completions", json={**words, "stream": False})
    assert whole.status_code == 200, whole.text
    assert whole.json()["choices"][0]["message"]["content"] == expected
    streamed = visitor.post("/api/chat/completions", json={**words, "stream": True})
    rows = [line[5:].strip() for line in streamed.text.splitlines() if line.startswith("data:")]
    pieces = [json.loads(row) for row in rows if row != "[DONE]"]
    deltas = [piece["choices"][0]["delta"] for piece in pieces if piece.get("choices")]
    assert "".join(delta.get("content") or "" for delta in deltas).strip() == expected


def test_what_is_refused_reaches_the_visitor_in_words(visitor):
    words = body("?", picture(1))
    words["messages"][0]["content"][0]["image_url"]["url"] = "data:image/png;base64,aGVsbG8="
    refused = visitor.post("/api/chat/completions", json={**words, "stream": False})
    assert refused.status_code == 400
    assert "not a picture" in refused.text
