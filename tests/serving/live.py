"""A real server on a real port, with a tiny real model."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import uvicorn

from mmlm.generation import GenerationSettings
from mmlm.generation.session import Sessions
from mmlm.messages import user
from mmlm.serving.engine import Engine
from mmlm.serving.openai_api import build_api
from mmlm.serving.serve import DrainingServer
from tests.tiny import picture


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def serving(engines: Sequence[Any], **options: Any) -> Generator[str]:
    """Serve models in a thread; gives the address."""
    app, port = build_api(engines, **options), free_port()
    config = uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning")
    server = DrainingServer(config, app.state.api, [e for e in engines if isinstance(e, Engine)])
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)


def until(condition: Any, seconds: float = 30.0) -> None:
    """Wait for something that happens in another thread or process."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen within {seconds:g} seconds"
        time.sleep(0.01)


def long_question(tiny: Any, num_tokens: int = 150) -> tuple[str, Any]:
    """Return a question and a picture whose answer the tiny model does not end soon."""
    settings = GenerationSettings(max_new_tokens=num_tokens + 1)
    for number in range(40):
        talk = [user(f"{number}?", [picture(number)])]
        if Sessions(tiny.model, tiny.processor).answer(talk, settings)[1].num_tokens > num_tokens:
            return f"{number}?", picture(number)
    raise AssertionError("no question has a long answer")
