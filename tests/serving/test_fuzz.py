"""Thousands of broken requests and pictures: each gets an answer in words, and nothing is left.

`MMLM_FUZZ_SEED=N` begins elsewhere.
"""

from __future__ import annotations

import base64
import copy
import gc
import io
import json
import os
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from mmlm.generation.session import Sessions
from mmlm.serving.engine import Engine
from mmlm.serving.openai_api import ApiLimits, build_api
from tests.tiny import compose_tiny, picture

pytestmark = pytest.mark.slow
SEED = int(os.environ.get("MMLM_FUZZ_SEED", "0"))
REQUESTS, PICTURES = 2400, 1200
GROWTH_BYTES = 24 << 20
"""How much the process may have grown at the end: what allocators and caches hold back."""

NAMED = {429, 503}
ODD = [
    None, True, False, 0, -1, 1, 3.5, 1e308, -1e308, 2**31, 2**63, 2**64, -(2**63) - 1, 10**40, "",
    " ", "a", "\x00", "\ud800", "𝕏" * 50, "<image>", "<|im_end|>", "../../etc/passwd", "null",
    [], {}, [[]], [None], {"": None}, {"type": "text"}, {"type": "image_url"}, [{}] * 40,
    {"url": "data:image/png;base64,"}, {"url": {"url": {}}}, "data:,", "data:image/png;base64,%%%",
    "https://127.0.0.1/", "http://[::1]/", "https://[", "file:///etc/passwd", float("nan"),
    float("inf"), "a" * 5000, list(range(100)),
]  # fmt: skip
FIELDS = [
    "model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k",
    "repetition_penalty", "stop", "seed", "n", "stream", "stream_options", "logprobs",
    "top_logprobs", "response_format", "frequency_penalty", "presence_penalty", "tools",
    "functions", "unknown",
]  # fmt: skip


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def as_file(image, kind):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    tiny = compose_tiny(tmp_path_factory.mktemp("tiny"))
    engine = Engine(Sessions(tiny.model, tiny.processor, budget_bytes=1 << 20), name="tiny")
    limits = ApiLimits(max_new_tokens=3, max_body_bytes=300_000, max_pixels=1_000_000)
    app = build_api([engine], limits=limits)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def sound():
    """A request that is answered."""
    url = "data:image/png;base64," + base64.b64encode(as_file(picture(1, 9, 9), "PNG")).decode()
    shown = {"type": "image_url", "image_url": {"url": url, "detail": "auto"}}
    return {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [shown, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "A cat."},
            {"role": "user", "content": "And?"},
        ],
        "max_tokens": 2,
        "temperature": 0.5,
        "stop": ["!"],
        "stream": False,
    }


def places_in(value, path=()):
    """Every place of a JSON value."""
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places_in(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from places_in(inner, (*path, index))


def changed(draw, value):
    """Put something odd at a place, or take it away."""
    value = copy.deepcopy(value)
    for _ in range(draw.randint(1, 3)):
        path = draw.choice([path for path in places_in(value) if path] or [()])
        if not path or not isinstance(value, dict) or draw.random() < 0.25:
            value = value if isinstance(value, dict) else sound()
            value[draw.choice(FIELDS)] = copy.deepcopy(draw.choice(ODD))
            continue
        owner = value
        for step in path[:-1]:
            owner = owner[step]
        if draw.random() < 0.2:
            del owner[path[-1]]
        else:
            owner[path[-1]] = copy.deepcopy(draw.choice(ODD))
    return value


def broken(draw, data, most=8):
    """Flip, cut, double or insert bytes."""
    data = bytearray(data)
    for _ in range(draw.randint(1, most)):
        if not data:
            return b""
        place, kind = draw.randrange(len(data)), draw.random()
        if kind < 0.55:
            data[place] = draw.randrange(256)
        elif kind < 0.7:
            del data[place : place + draw.randint(1, 40)]
        elif kind < 0.8:
            del data[place:]
        elif kind < 0.9:
            data[place:place] = bytes(draw.randrange(256) for _ in range(draw.randint(1, 40)))
        else:
            data[place:place] = data[place : place + 200]
    return bytes(data)


def requests(draw):
    """Bodies and headers, each wrong in its own way; a few are sound by chance."""
    json_kind = {"content-type": "application/json"}
    for number in range(REQUESTS):
        way = number % 6
        if way < 3:
            value = changed(draw, sound())
            data = json.dumps(value).encode("utf-8", "surrogatepass")
            yield data, json_kind
        elif way == 3:
            yield broken(draw, json.dumps(sound()).encode()), json_kind
        elif way == 4:
            whole = draw.choice(ODD)
            yield json.dumps(whole).encode("utf-8", "surrogatepass"), json_kind
        else:
            depth = draw.choice([10, 900, 1100, 100_000])
            odd = [
                (b"[" * depth + b"]" * depth, json_kind),
                (b'{"messages":' * depth, json_kind),
                (os.urandom(draw.randint(0, 500)), json_kind),
                (json.dumps(sound()).encode(), {"content-type": draw.choice(["", "text/plain",
                 "multipart/form-data", "application/xml", "application/json; charset=x"])}),
                (json.dumps(sound()).encode("utf-16"), json_kind),
                (b" " * 300_001, json_kind),
                (json.dumps(sound()).encode(), {**json_kind, "authorization": "\x7f" * 50}),
            ]  # fmt: skip
            yield draw.choice(odd)


def check(response, seen):
    """An answer, or an error in the form that clients read."""
    seen[response.status_code] += 1
    assert response.status_code < 500 or response.status_code in NAMED, response.text[:2000]
    if response.status_code == 200 or response.status_code in (405, 404):
        return
    error = response.json()["error"]
    assert error["message"].strip()
    assert len(error["message"]) < 2000
    assert not re.search(r"Traceback|\bb'|\bb\"|_io\.|/site-packages/", error["message"])


def test_malformed_requests_are_answered_in_words_and_leave_nothing_behind(client):
    draw, seen = random.Random(SEED), Counter()
    jobs = list(requests(draw))
    floor = 0
    for number, (data, headers) in enumerate(jobs):
        response = client.post("/v1/chat/completions", content=data, headers=headers)
        check(response, seen)
        if number == len(jobs) // 4:
            gc.collect()
            floor = resident()
    gc.collect()
    print(f"seed {SEED}: {dict(seen)}, grown by {(resident() - floor) / 1e6:.1f} MB")
    assert seen[400] > REQUESTS // 3
    assert resident() - floor < GROWTH_BYTES
    api = client.app.state.api
    assert api.num_open == 0
    assert client.post("/v1/chat/completions", json=sound()).status_code == 200


def pictures():
    """Sound files of every kind that is taken, and of some that are not."""
    image = picture(3, 40, 56)
    grey, clear = image.convert("L"), image.convert("RGBA")
    frames = [Image.fromarray(np.full((20, 20), value, np.uint8)) for value in (0, 90, 255)]
    moving = io.BytesIO()
    frames[0].save(moving, "GIF", save_all=True, append_images=frames[1:])
    deep = Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 100)
    files = [as_file(image, kind) for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")]
    files += [as_file(grey, "JPEG"), as_file(clear, "PNG"), as_file(clear, "WEBP")]
    return [*files, as_file(image.convert("P"), "PNG"), as_file(deep, "PNG"), moving.getvalue()]


def test_broken_pictures_are_answered_in_words_and_leave_nothing_behind(client):
    draw, seen = random.Random(SEED), Counter()
    sources = pictures()
    floor = 0
    for number in range(PICTURES):
        data = broken(draw, sources[number % len(sources)], most=4 if number % 2 else 40)
        url = "data:image/png;base64," + base64.b64encode(data).decode()
        parts = [{"type": "image_url", "image_url": url}, {"type": "text", "text": "What?"}]
        body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 1}
        check(client.post("/v1/chat/completions", json=body), seen)
        if number == PICTURES // 4:
            gc.collect()
            floor = resident()
    gc.collect()
    print(f"seed {SEED}: {dict(seen)}, grown by {(resident() - floor) / 1e6:.1f} MB")
    assert seen[400] > PICTURES // 4
    assert resident() - floor < GROWTH_BYTES
    assert client.app.state.api.num_open == 0
