"""An API that speaks OpenAI's words: `mmlm serve MODEL`.

    engine ──► openai_api ──► open-webui, the `openai` package, lmms-eval
               you are here

`/v1/models`, `/v1/chat/completions` (whole or streamed), `/health` (alive), `/ready` (takes
requests) and `/metrics`. It is for one machine and few users: answers are given one at a time,
in the order of the requests, and beyond `max_waiting` a client is told to come back. What a
request may say is in `openai_schema`, how pictures are obtained in `fetch`.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from mmlm.config import Config
from mmlm.errors import MissingExtraError, UsageError
from mmlm.generation import GenerationSettings
from mmlm.generation.session import Piece, Usage
from mmlm.images import open_image, read_size
from mmlm.messages import Message, images_of
from mmlm.serving.engine import Engine, Speaker
from mmlm.serving.fetch import Fetcher, FetchRules
from mmlm.serving.metrics import Metrics
from mmlm.serving.openai_schema import (
    Answer,
    ChatRequest,
    finish_of,
    messages_of,
    num_pictures,
    usage_body,
)

try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
except ImportError as fault:
    raise MissingExtraError("fastapi", needed_for="The API", extra="app") from fault

from mmlm.serving.gate import Guard, RefusalError, answer_to, explain_errors, response_to

_LOOK_EVERY_SECONDS = 0.25
_CLIENT_LEFT = 499
DONE = "data: [DONE]\n\n"


class ApiLimits(Config):
    """What one client may ask of the server."""

    max_body_bytes: int = 100_000_000
    """Most bytes of a request."""

    max_images: int = 16
    """Most pictures of a request."""

    max_pixels: int = 40_000_000
    """Most pixels of one picture, known from its header."""

    max_letters: int = 200_000
    """Most letters of a request's text."""

    max_new_tokens: int = 2048
    """Longest answer, and what is used where a request says nothing."""

    max_waiting: int = 16
    """Most requests in line; the next one gets 429."""


class Api:
    """What the routes do.

    Args:
        speakers: The models, by their names.
        fetcher: Obtains pictures.
        limits: What one client may ask.
    """

    def __init__(self, speakers: Sequence[Speaker], fetcher: Fetcher, limits: ApiLimits) -> None:
        self.speakers = {speaker.name: speaker for speaker in speakers}
        self.fetcher, self.limits = fetcher, limits
        self.metrics = Metrics()
        self.draining = False
        self.num_open = 0

    def speaker(self, name: str) -> Speaker:
        """Return the model of a name; without a name, the only one."""
        if not name and len(self.speakers) == 1:
            return next(iter(self.speakers.values()))
        if name not in self.speakers:
            known = ", ".join(self.speakers)
            raise RefusalError(
                404, f"No model is named {name!r}. Known: {known}.", "model_not_found"
            )
        return self.speakers[name]

    def read(self, asked: ChatRequest) -> list[Message]:
        """Return the conversation of a request, every picture of it looked at."""
        reasons = asked.refusals()
        if reasons:
            raise RefusalError(400, " ".join(reasons), "unsupported")
        pictures = num_pictures(asked.messages)
        if pictures > self.limits.max_images:
            raise RefusalError(
                400,
                f"The request shows {pictures} pictures; the limit is {self.limits.max_images}.",
            )
        messages = messages_of(asked.messages, self.fetcher.fetch)
        letters = sum(len(message.text) for message in messages)
        if letters > self.limits.max_letters:
            raise RefusalError(
                400,
                f"The request has {letters:,} letters; the limit is {self.limits.max_letters:,}.",
            )
        for picture in images_of(messages):
            read_size(picture, max_pixels=self.limits.max_pixels)
            open_image(picture, max_pixels=self.limits.max_pixels)
        return messages

    async def pieces(
        self, speaker: Speaker, messages: list[Message], settings: GenerationSettings, num_top: int
    ) -> AsyncGenerator[Piece]:
        """Give an answer piece by piece; whoever stops listening ends generation.

        The model works in a thread of its own, so that a client that leaves is noticed while
        it still waits for its turn.
        """
        loop, stop = asyncio.get_running_loop(), threading.Event()
        queue: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()

        def put(item: Piece | BaseException | None) -> None:
            if not stop.is_set():
                loop.call_soon_threadsafe(queue.put_nowait, item)

        def work() -> None:
            try:
                for piece in speaker.stream(messages, settings, stop, num_top=num_top):
                    put(piece)
                put(None)
            except BaseException as fault:
                put(fault)

        threading.Thread(target=work, daemon=True).start()
        last: Piece | None = None
        try:
            while (item := await queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                last = item
                yield item
        finally:
            stop.set()
            if last is not None:
                self.metrics.answer(last.usage)


async def _collect(pieces: AsyncGenerator[Piece], request: Request) -> list[Piece]:
    """Gather an answer, and give up when the client has left."""

    async def gather() -> list[Piece]:
        async with aclosing(pieces) as given:
            return [piece async for piece in given]

    task = asyncio.ensure_future(gather())
    try:
        while not task.done():
            await asyncio.wait([task], timeout=_LOOK_EVERY_SECONDS)
            if not task.done() and await request.is_disconnected():
                raise RefusalError(_CLIENT_LEFT, "The client left.")
        return task.result()
    finally:
        task.cancel()


def build_api(
    speakers: Sequence[Speaker],
    *,
    keys: Sequence[str] = (),
    rules: FetchRules | None = None,
    limits: ApiLimits | None = None,
    fetcher: Fetcher | None = None,
) -> FastAPI:
    """Return the API as an ASGI application.

    Args:
        speakers: The models that it serves.
        keys: Clients must send one of these; none when empty.
        rules: Which remote pictures are allowed.
        limits: What one client may ask.
        fetcher: Obtains pictures, in place of one made from `rules`.
    """
    api = Api(speakers, fetcher or Fetcher(rules), limits or ApiLimits())
    app = FastAPI(title="MMLM", description=str(__doc__), docs_url=None, redoc_url=None)
    app.state.api = api
    explain_errors(app, api.metrics)
    app.add_middleware(
        Guard, metrics=api.metrics, max_body_bytes=api.limits.max_body_bytes,
        keys=[key.encode() for key in keys],
    )  # fmt: skip

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Say that the process lives."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> Response:
        """Say whether requests are taken."""
        status = "draining" if api.draining else "ready"
        return JSONResponse({"status": status}, 503 if api.draining else 200)

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        """Give the counters to Prometheus."""
        return PlainTextResponse(api.metrics.text({"requests_open": api.num_open}))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """List the models."""
        rows = [
            {"id": name, "object": "model", "created": 0, "owned_by": "mmlm"}
            for name in api.speakers
        ]
        return {"object": "list", "data": rows}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """Describe one model."""
        api.speaker(name)
        return {"id": name, "object": "model", "created": 0, "owned_by": "mmlm"}

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, request: Request) -> Response:
        """Answer a conversation about pictures."""
        try:
            return await _chat(api, asked, request)
        except Exception as fault:
            return response_to(fault, api.metrics)

    return app


async def _chat(api: Api, asked: ChatRequest, request: Request) -> Response:
    speaker = api.speaker(asked.model)
    if api.draining:
        raise RefusalError(503, "The server is about to stop; try another one, or later.")
    if api.num_open > api.limits.max_waiting:
        raise RefusalError(429, f"{api.num_open} requests are in line already; try again later.")
    api.num_open += 1
    handed_on = False
    try:
        messages = await asyncio.to_thread(api.read, asked)
        word_of = _word_of(speaker)
        answer = Answer(f"chatcmpl-{uuid.uuid4().hex}", speaker.name, word_of)
        if asked.stream:
            body = _events(api, speaker, asked, messages, answer)
            first = await anext(body)  # a fault before the first word still gets its status
            handed_on = True
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            stream = _closing(api, first, body)
            return StreamingResponse(stream, media_type="text/event-stream", headers=headers)
        choices: list[tuple[list[Piece], bool]] = []
        for choice in range(asked.n or 1):
            settings = asked.settings(api.limits.max_new_tokens, choice)
            pieces = api.pieces(speaker, messages, settings, asked.top_logprobs or 0)
            choices.append((await _collect(pieces, request), bool(asked.logprobs)))
        api.metrics.request(200)
        return JSONResponse(answer.whole(choices))
    finally:
        if not handed_on:
            api.num_open -= 1


async def _events(
    api: Api, speaker: Speaker, asked: ChatRequest, messages: list[Message], answer: Answer
) -> AsyncGenerator[str]:
    """Give the events of a streamed answer: role first, then words, why it ended, and the end."""
    usages: list[Usage] = []
    for index in range(asked.n or 1):
        settings = asked.settings(api.limits.max_new_tokens, index)
        pieces = api.pieces(speaker, messages, settings, asked.top_logprobs or 0)
        usage: Usage | None = None
        said = ""
        async with aclosing(pieces) as given:
            async for piece in given:
                if usage is None:
                    usage = piece.usage
                    yield answer.chunk(index, {"role": "assistant", "content": ""})
                # The whole answer is stripped; a stream can only leave out how it begins.
                text = piece.text if said else piece.text.lstrip()
                said += text
                if text or (asked.logprobs and piece.token_id is not None):
                    shown = [piece] if asked.logprobs else None
                    yield answer.chunk(index, {"content": text}, pieces=shown)
        yield answer.chunk(index, {}, finish_of(usage))
        usages += [usage] if usage is not None else []
    if asked.stream_options is not None and asked.stream_options.include_usage:
        yield answer.event({"choices": [], "usage": usage_body(usages)})
    yield DONE


async def _closing(api: Api, first: str, events: AsyncGenerator[str]) -> AsyncIterator[str]:
    """Pass events on; a fault in the middle becomes an event, because the status is sent."""
    status = _CLIENT_LEFT
    try:
        yield first
        async for event in events:
            yield event
        status = 200
    except Exception as fault:
        status, body = answer_to(fault)
        yield f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
        yield DONE
    finally:
        api.num_open -= 1
        api.metrics.request(status)
        await events.aclose()


def _word_of(speaker: Speaker) -> Callable[[int], str]:
    """Return what writes one token of a model as text."""
    sessions = getattr(speaker, "sessions", None)
    if sessions is None:
        return str
    tokenizer = sessions.processor.tokenizer
    return lambda token: tokenizer.decode([token])


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
    engines: list[Speaker] = [Engine.load(source) for source in sources]
    names = [engine.name for engine in engines]
    if len(set(names)) < len(names):
        raise UsageError(f"Two models are named alike ({', '.join(names)}). Rename a folder.")
    app: Any = build_api(engines, keys=keys, rules=FetchRules(allowed_hosts=tuple(allowed_hosts)))
    if page:
        app = _with_page(app, engines, keys)
    print(f"The API is at http://{host}:{port}/v1, models: {', '.join(names)}")
    if page:
        gate = ' (sign in as "mmlm", with a key)' if keys else ""
        print(f"The page is at http://{host}:{port}/{gate}")
    if host not in ("127.0.0.1", "localhost", "::1"):
        gate = "with a key" if keys else "without a key"
        print(f"It listens on {host}: everybody who can reach this machine can use it, {gate}.")
    uvicorn.run(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=30)


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
