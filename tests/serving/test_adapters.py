"""Several voices of one model: each says what it would say alone, and nobody hears another."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fastapi.testclient import TestClient

from mmlm.assistant import load
from mmlm.errors import CheckpointError, UsageError
from mmlm.generation import GenerationSettings
from mmlm.generation.session import Sessions
from mmlm.messages import user
from mmlm.serving.adapters import Voices, load_voices
from mmlm.serving.openai_api import build_api
from tests.tiny import compose_tiny, picture

peft = pytest.importorskip("peft")
SETTINGS = GenerationSettings(max_new_tokens=10)
TARGETS = ["q_proj", "v_proj"]


def thin(model, seed):
    """Put thin matrices on a model and fill them."""
    config = peft.LoraConfig(r=4, target_modules=TARGETS, lora_alpha=32)
    model.add_adapter(config, adapter_name="default")
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, a delta with thin matrices and a connector of its own, a PEFT folder, a model."""
    place = tmp_path_factory.mktemp("voices")
    base = compose_tiny(place / "parts")
    base.save(place / "base")
    delta = load(place / "base")
    delta.model.config.sources = base.model.config.sources
    with torch.no_grad():
        for parameter in delta.model.model.connector.parameters():
            parameter.mul_(1.5)
    thin(delta.model, 1)
    delta.save(place / "delta", delta=True)
    plain = load(place / "base")
    thin(plain.model, 2)
    plain.model.save_pretrained(place / "peft")
    whole = load(place / "base")
    with torch.no_grad():
        next(whole.model.model.connector.parameters()).mul_(-2.0)
    whole.save(place / "whole")
    alone = {"base": load(place / "base"), "delta": delta, "peft": plain, "whole": whole}
    return place, {name: assistant.model.eval() for name, assistant in alone.items()}, base


def said_alone(model, processor, text, image):
    return Sessions(model, processor).answer([user(text, [image])], SETTINGS)[0]


def test_every_voice_says_what_it_says_alone_also_all_at_once(folders):
    place, models, base = folders
    named = [(name, str(place / name)) for name in ("delta", "peft", "whole")]
    engines = load_voices(place / "base", named, budget_bytes=1 << 20)
    assert [engine.name for engine in engines] == ["base", "delta", "peft", "whole"]
    assert len({id(engine.sessions.model) for engine in engines}) == 1
    client = TestClient(build_api(engines))

    def ask(job):
        name, number = job
        engine = next(engine for engine in engines if engine.name == name)
        pieces = engine.stream([user(f"{number}?", [picture(number)])], SETTINGS)
        return "".join(piece.text for piece in pieces).strip()

    jobs = [(name, number) for number in range(3) for name in models]
    expected = [
        said_alone(models[name], base.processor, f"{number}?", picture(number))
        for name, number in jobs
    ]
    assert len(set(expected[:4])) == 4  # the voices differ
    assert [ask(job) for job in jobs] == expected
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, jobs)) == expected
    body = {"messages": [{"role": "user", "content": "Hello?"}], "max_tokens": 5, "model": "peft"}
    assert client.post("/v1/chat/completions", json=body).json()["model"] == "peft"


def test_what_does_not_fit_the_base_is_refused(folders, tmp_path):
    place, _, _ = folders
    with pytest.raises(UsageError, match="no folder"):
        load_voices(place / "base", [("a", str(tmp_path / "nothing"))])
    with pytest.raises(UsageError, match="named like the base"):
        load_voices(place / "base", [("base", str(place / "peft"))])
    compose_tiny(tmp_path / "parts", "siglip").save(tmp_path / "other")
    with pytest.raises(CheckpointError, match="other parts than the base"):
        load_voices(place / "base", [("a", str(tmp_path / "other"))])
    with pytest.raises(UsageError, match="has adapters itself"):
        Voices(load(place / "delta").model)
