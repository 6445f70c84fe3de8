"""The Space, started as the Space runner starts it, with a tiny real model."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest
import yaml
from gradio_client import Client, handle_file

from mmlm.generation import GenerationSettings
from mmlm.generation.session import Sessions
from mmlm.messages import user
from tests.tiny import compose_tiny, picture

ROOT = Path(__file__).parents[2]
SPACE = ROOT / "app"


def front_matter():
    return yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---\n")[1])


def test_the_front_matter_is_what_the_hub_reads():
    matter = front_matter()
    assert matter["sdk"] == "gradio"
    assert (SPACE / matter["app_file"]).is_file()
    assert re.fullmatch(r"\d+\.\d+\.\d+", matter["sdk_version"])
    assert matter["sdk_version"].split(".")[0] == version("gradio").split(".")[0]
    assert len(matter["short_description"]) <= 60
    colours = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {matter["colorFrom"], matter["colorTo"]} <= colours


def test_the_space_is_one_thin_script():
    assert len((SPACE / "app.py").read_text(encoding="utf-8").splitlines()) < 30


@pytest.fixture
def space(tmp_path):
    """Start a copy of the folder beside a tiny model; gives its address and the model."""
    tiny = compose_tiny(tmp_path / "parts")
    shutil.copytree(SPACE, tmp_path / "space")
    tiny.save(tmp_path / "space/model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port), "SYSTEM": "spaces",
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    command = [sys.executable, front_matter()["app_file"]]
    process = subprocess.Popen(
        command, cwd=tmp_path / "space", env={**os.environ, **settings},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}/"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(address).status_code == 200:
                break
        except httpx.TransportError:
            time.sleep(0.2)
    if process.poll() is not None:
        pytest.fail(process.stdout.read())
    yield address, tiny
    process.terminate()
    process.wait(20)


def test_the_space_answers_like_the_model(space, tmp_path):
    address, tiny = space
    picture(1).save(tmp_path / "a.png")
    client = Client(address, verbose=False)
    message = {"text": "What?", "files": [handle_file(tmp_path / "a.png")]}
    told = client.predict(message, max_new_tokens=12, api_name="/chat")
    sessions = Sessions(tiny.model, tiny.processor)
    settings = GenerationSettings(max_new_tokens=12)
    assert told == sessions.answer([user("What?", [picture(1)])], settings)[0]
    assert isinstance(
        client.predict({"text": "And?", "files": []}, max_new_tokens=12, api_name="/chat"), str
    )
