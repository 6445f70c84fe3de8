"""Listening: `mmlm serve MODEL` as a process, from the port to the last answer.

    engine, openai_api, chat_ui ──► serve ──► a port
                                    you are here

On SIGTERM the server drains: `/ready` answers 503 and new questions are refused, while answers
that have begun are given to their end; then the process ends. A second signal, or Ctrl-C, ends
it sooner. What the routes do is in `openai_api`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from mmlm.config import Config
from mmlm.errors import MissingExtraError, UsageError
from mmlm.generation.session import BUDGET_BYTES
from mmlm.serving.about import read_about
from mmlm.serving.adapters import load_voices
from mmlm.serving.behind import Behind
from mmlm.serving.engine import Engine, Speaker
from mmlm.serving.fetch import FetchRules
from mmlm.serving.ports import check_port
from mmlm.serving.vllm import VLLM, stock_folder, words_of

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

    def __init__(self, config: uvicorn.Config, api: Api, engines: Sequence[Speaker]) -> None:
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
            idle = all(getattr(engine, "is_idle", True) for engine in self._engines)
            busy = self._api.num_open > 0 or not idle
            self.should_exit |= not busy or time.monotonic() > self._latest
        return await super().on_tick(counter)


class EngineChoice(Config):
    """What computes the answers."""

    kind: Literal["local", "vllm"] = "local"
    """This process, for few users; or a vLLM process behind our front, for many."""

    url: str | None = None
    """An OpenAI server that runs already and is used in place of a vLLM process of our own."""

    options: tuple[str, ...] = ()
    """More words for `vllm serve`."""

    bits: int | None = None
    """Hold the language model in 4 (NF4) or 8 bits; local alone."""

    adapters: tuple[tuple[str, str], ...] = ()
    """Names and folders of adapters on the one model that is served; local alone."""

    cache_bytes: int = BUDGET_BYTES
    """Memory for the caches of the conversations of one model; local alone."""


@contextmanager
def speakers_of(sources: Sequence[str | Path], choice: EngineChoice) -> Generator[list[Speaker]]:
    """Load models, or start what runs them; it ends with the context.

    Raises:
        UsageError: if the words do not fit the engine, or two models have one name.
        CheckpointError: if a model cannot be loaded.
    """
    _check_choice(sources, choice)
    with ExitStack() as ending:
        speakers: list[Speaker] = []
        if choice.url is not None:
            speakers.append(_at_url(sources[0], choice.url))
        elif choice.kind == "vllm":
            engine = VLLM(sources[0], options=choice.options)
            ending.callback(engine.end)
            engine.start()
            speakers.append(engine.speaker)
        elif choice.adapters:
            speakers += load_voices(
                sources[0], choice.adapters, budget_bytes=choice.cache_bytes, bits=choice.bits
            )
        else:
            speakers += [
                Engine.load(source, budget_bytes=choice.cache_bytes, bits=choice.bits)
                for source in sources
            ]
        names = [speaker.name for speaker in speakers]
        if len(set(names)) < len(names):
            raise UsageError(f"Two models are named alike ({', '.join(names)}). Rename a folder.")
        yield speakers


def _check_choice(sources: Sequence[str | Path], choice: EngineChoice) -> None:
    if choice.kind == "vllm" and (choice.bits or choice.adapters):
        raise UsageError(
            "--bits and --adapter belong to --engine local; give vLLM its own words for them with "
            "--engine-options, such as '--quantization bitsandbytes'."
        )
    if choice.kind == "local" and (choice.url or choice.options):
        raise UsageError("--engine-url and --engine-options belong to --engine vllm.")
    if len(sources) > 1 and (choice.kind == "vllm" or choice.adapters):
        raise UsageError(f"One model is served with these words (got {len(sources)}).")


def _at_url(source: str | Path, url: str) -> Behind:
    """Return the model of a server that runs already; the folder tells its words."""
    folder, about = stock_folder(source), read_about(source)
    key = os.environ.get("MMLM_ENGINE_KEY", "")
    name = about.title or folder.name
    model = os.environ.get("MMLM_ENGINE_MODEL", name)
    return Behind(name, url, model=model, key=key, about=about, **words_of(folder))


def serve_api(
    sources: Sequence[str | Path],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    keys: Sequence[str] = (),
    allowed_hosts: Sequence[str] = (),
    page: bool = False,
    engine: EngineChoice | None = None,
) -> None:
    """Load models and serve them until interrupted.

    Args:
        sources: Model folders or Hub ids.
        host: Where to listen; anything but 127.0.0.1 lets others in.
        port: The port.
        keys: Clients must send one of these; none when empty.
        allowed_hosts: Hosts from which pictures may be fetched; none when empty.
        page: Serve the chat page too.
        engine: What computes the answers.

    Raises:
        UsageError: if two models have one name, or the port is taken.
        CheckpointError: if a model cannot be loaded.
    """
    check_port(host, port, "API")
    with _ending_in_order(), speakers_of(sources, engine or EngineChoice()) as speakers:
        rules = FetchRules(allowed_hosts=tuple(allowed_hosts))
        app: Any = build_api(speakers, keys=keys, rules=rules)
        api: Api = app.state.api
        if page:
            app = _with_page(app, speakers, keys)
        announce(host, port, [speaker.name for speaker in speakers], page, bool(keys))
        config = uvicorn.Config(
            app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=30
        )
        DrainingServer(config, api, speakers).run()


@contextmanager
def _ending_in_order() -> Generator[None]:
    """Let a SIGTERM while models load leave through every `finally`: no engine is left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def announce(host: str, port: int, names: Sequence[str], page: bool, guarded: bool) -> None:
    """Say where it listens, and who can reach it."""
    print(f"The API is at http://{host}:{port}/v1, models: {', '.join(names)}", flush=True)
    if page:
        gate = ' (sign in as "mmlm", with a key)' if guarded else ""
        print(f"The page is at http://{host}:{port}/{gate}", flush=True)
    if host not in ("127.0.0.1", "localhost", "::1"):
        gate = "with a key" if guarded else "without a key"
        print(
            f"It listens on {host}: everybody who can reach this machine can use it, {gate}.",
            flush=True,
        )


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
