"""Listening: `mmlm serve MODEL` as a process, from the port to the last answer.

    engine, openai_api, chat_ui ──► serve ──► a port
                                    you are here

On SIGTERM the server drains: `/ready` answers 503 and new questions are refused, while answers
that have begun are given to their end; then the process ends. A second signal, or Ctrl-C, ends
it sooner. What the routes do is in `openai_api`.
"""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from mmlm.errors import MissingExtraError, UsageError
from mmlm.serving.engine import Engine, Speaker
from mmlm.serving.fetch import FetchRules

try:
    import uvicorn
    from fastapi import FastAPI
except ImportError as fault:
    raise MissingExtraError("fastapi", needed_for="The API", extra="app") from fault

from mmlm.serving.openai_api import Api, build_api

DRAIN_SECONDS = 300.0
"""How long answers that have begun may take after SIGTERM."""


class DrainingServer(uvicorn.Server):
    """Ends when the last answer was given.

    Args:
        config: How to listen.
        api: Knows what is being answered.
        engines: The models; the chat page asks them without the API.
    """

    def __init__(self, config: uvicorn.Config, api: Api, engines: Sequence[Engine]) -> None:
        super().__init__(config)
        self._api, self._engines = api, engines
        self._latest = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain at the first SIGTERM; anything else ends the server as usual."""
        if sig == signal.SIGTERM and not self._api.draining:
            self._api.draining = True
            self._latest = time.monotonic() + DRAIN_SECONDS
            return
        super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """Look, ten times a second, whether the server may end."""
        if self._api.draining:
            busy = self._api.num_open > 0 or not all(engine.is_idle for engine in self._engines)
            self.should_exit |= not busy or time.monotonic() > self._latest
        return await super().on_tick(counter)


def serve_api(
    sources: Sequence[str | Path],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    keys: Sequence[str] = (),
    allowed_hosts: Sequence[str] = (),
    page: bool = False,
) -> None:
    """Load models and serve them until interrupted.

    Args:
        sources: Model folders or Hub ids.
        host: Where to listen; anything but 127.0.0.1 lets others in.
        port: The port.
        keys: Clients must send one of these; none when empty.
        allowed_hosts: Hosts from which pictures may be fetched; none when empty.
        page: Serve the chat page too.

    Raises:
        UsageError: if two models have one name, or the port is taken.
        CheckpointError: if a model cannot be loaded.
    """
    _check_port(host, port)
    engines = [Engine.load(source) for source in sources]
    names = [engine.name for engine in engines]
    if len(set(names)) < len(names):
        raise UsageError(f"Two models are named alike ({', '.join(names)}). Rename a folder.")
    app: Any = build_api(engines, keys=keys, rules=FetchRules(allowed_hosts=tuple(allowed_hosts)))
    api: Api = app.state.api
    if page:
        app = _with_page(app, engines, keys)
    print(f"The API is at http://{host}:{port}/v1, models: {', '.join(names)}", flush=True)
    if page:
        gate = ' (sign in as "mmlm", with a key)' if keys else ""
        print(f"The page is at http://{host}:{port}/{gate}")
    if host not in ("127.0.0.1", "localhost", "::1"):
        gate = "with a key" if keys else "without a key"
        print(f"It listens on {host}: everybody who can reach this machine can use it, {gate}.")
    config = uvicorn.Config(
        app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=30
    )
    DrainingServer(config, api, engines).run()


def _with_page(app: FastAPI, engines: Sequence[Speaker], keys: Sequence[str]) -> Any:
    """Put the chat page beside the API; where keys are asked for, people sign in with one."""
    import gradio

    from mmlm.serving.chat_ui import build_page, page_options

    options = page_options()
    chosen = {name: options[name] for name in ("theme", "css", "head", "max_file_size")}
    examples = [e.image for engine in engines for e in engine.about.examples if e.image]
    return gradio.mount_gradio_app(
        app, build_page(engines[:2]), path="/", allowed_paths=examples, footer_links=[],
        show_error=True, ssr_mode=False, auth=[("mmlm", key) for key in keys] or None, **chosen,
    )  # fmt: skip


def _check_port(host: str, port: int) -> None:
    """Refuse a port that is taken before a model is loaded."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as fault:
            raise UsageError(
                f"The API cannot listen on {host}:{port}: {fault.strerror}. Choose another --port."
            ) from None
