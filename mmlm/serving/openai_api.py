"""An API that speaks OpenAI's words: `mmlm serve MODEL`.

    engine ──► openai_api ──► open-webui, the `openai` package, lmms-eval
               you are here

`/v1/models`, `/v1/chat/completions` (whole or streamed), `/health` (alive), `/ready` (takes
requests) and `/metrics`. It is for one machine and few users: a few answers grow together,
clients take turns, and beyond `max_waiting` one is told to come back. What a request may say is
in `openai_schema`, how pictures are obtained in `fetch`, how the process listens in `serve`.
"""

from __future__ import annotations

import asyncio
import json
import threading
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from mmlm.config import Config
from mmlm.errors import MissingExtraError
from mmlm.generation.session import Piece, Usage
from mmlm.images import open_image, read_size
from mmlm.messages import Message
from mmlm.serving import api_document as told
from mmlm.serving.engine import Speaker
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
    from fastapi import Depends, FastAPI, Request
    from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
    from fastapi.security import HTTPBearer
except ImportError as fault:
    raise MissingExtraError("fastapi", needed_for="The API", extra="app") from fault

from mmlm.serving.gate import Guard, RefusalError, answer_to, explain_errors, response_to

T = TypeVar("T")
LOW_SIDE_PX = 512
"""Longest side of a picture of low detail, as OpenAI's own servers have it."""

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

    max_waiting: int = 64
    """Most requests at once, answered or in line; the next one gets 429. lmms-eval sends 32 at
    once, and counts as empty what is refused too often."""


@dataclass(frozen=True)
class _Job:
    """A request that was read."""

    asked: ChatRequest
    messages: list[Message]
    speaker: Speaker
    client: str
    answer: Answer


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

    def engines_are_ready(self) -> bool:
        """Whether every model answers; one that is here always does."""
        return all(getattr(speaker, "is_ready", True) for speaker in self.speakers.values())

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
        messages = messages_of(asked.messages, self.picture)
        letters = sum(len(message.text) for message in messages)
        if letters > self.limits.max_letters:
            raise RefusalError(
                400,
                f"The request has {letters:,} letters; the limit is {self.limits.max_letters:,}.",
            )
        return messages

    def picture(self, url: str, detail: str) -> Any:
        """Obtain a picture, look at all of it, and shrink it where its detail is not wanted."""
        data = self.fetcher.fetch(url)
        size = read_size(data, max_pixels=self.limits.max_pixels)
        image = open_image(data, max_pixels=self.limits.max_pixels)
        if detail != "low" or max(size) <= LOW_SIDE_PX:
            return data
        image.thumbnail((LOW_SIDE_PX, LOW_SIDE_PX))
        return image

    async def pieces(self, job: _Job, choice: int) -> AsyncGenerator[Piece]:
        """Give an answer piece by piece; whoever stops listening ends generation.

        The pieces are waited for in a thread of their own, so that a client that leaves is
        noticed while it still stands in line.
        """
        asked = job.asked
        settings = asked.settings(self.limits.max_new_tokens, choice)
        loop, stop = asyncio.get_running_loop(), threading.Event()
        queue: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()

        def put(item: Piece | BaseException | None) -> None:
            if not stop.is_set():
                loop.call_soon_threadsafe(queue.put_nowait, item)

        def work() -> None:
            try:
                for piece in job.speaker.stream(
                    job.messages, settings, stop, num_top=asked.top_logprobs or 0,
                    as_json=asked.as_json, client=job.client,
                ):  # fmt: skip
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


async def _while_here(request: Request, work: Awaitable[T]) -> T:
    """Wait for some work, and give it up when the client leaves."""

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(leave())
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise RefusalError(_CLIENT_LEFT, "The client left.")
        return working.result()
    finally:
        leaving.cancel()
        working.cancel()


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
    # The guard asks for the key; this says so in the document.
    guarded = [Depends(HTTPBearer(auto_error=False, description="A key."))] if keys else []

    @app.get("/health", response_model=told.State)
    async def health() -> dict[str, str]:
        """Say that the process lives."""
        return {"status": "ok"}

    @app.get("/ready", response_model=told.State, responses=told.READY)
    async def ready() -> Response:
        """Say whether requests are taken."""
        status = "draining" if api.draining else "ready"
        if not api.draining and not await asyncio.to_thread(api.engines_are_ready):
            status = "loading"
        return JSONResponse({"status": status}, 200 if status == "ready" else 503)

    @app.get(
        "/metrics", response_class=PlainTextResponse, responses=told.errors(401),
        dependencies=guarded,
    )  # fmt: skip
    async def metrics() -> PlainTextResponse:
        """Give the counters to Prometheus."""
        return PlainTextResponse(api.metrics.text({"requests_open": api.num_open}))

    @app.get(
        "/v1/models", response_model=told.ModelList, responses=told.errors(401),
        dependencies=guarded,
    )  # fmt: skip
    async def models() -> dict[str, Any]:
        """List the models."""
        rows = [
            {"id": name, "object": "model", "created": 0, "owned_by": "mmlm"}
            for name in api.speakers
        ]
        return {"object": "list", "data": rows}

    @app.get(
        "/v1/models/{name:path}", response_model=told.ModelRow, responses=told.MODEL,
        dependencies=guarded,
    )  # fmt: skip
    async def model(name: str) -> dict[str, Any]:
        """Describe one model."""
        api.speaker(name)
        return {"id": name, "object": "model", "created": 0, "owned_by": "mmlm"}

    @app.post("/v1/chat/completions", responses=told.CHAT, dependencies=guarded)
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
        answer = Answer(f"chatcmpl-{uuid.uuid4().hex}", speaker.name, _word_of(speaker))
        job = _Job(asked, messages, speaker, _client_of(request), answer)
        if asked.stream:
            body = _events(api, job)
            # A fault before the first word still gets its status.
            first = await _while_here(request, anext(body))
            handed_on = True
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            stream = _closing(api, first, body)
            return StreamingResponse(stream, media_type="text/event-stream", headers=headers)
        choices = await _while_here(request, _all(api, job))
        api.metrics.request(200)
        return JSONResponse(answer.whole([(said, bool(asked.logprobs)) for said in choices]))
    finally:
        if not handed_on:
            api.num_open -= 1


async def _all(api: Api, job: _Job) -> list[list[Piece]]:
    """Gather every answer of a request."""
    choices: list[list[Piece]] = []
    for choice in range(job.asked.n or 1):
        async with aclosing(api.pieces(job, choice)) as given:
            choices.append([piece async for piece in given])
    return choices


async def _events(api: Api, job: _Job) -> AsyncGenerator[str]:
    """Give the events of a streamed answer: role first, then words, why it ended, and the end."""
    usages: list[Usage] = []
    asked, answer = job.asked, job.answer
    for index in range(asked.n or 1):
        usage: Usage | None = None
        said = ""
        async with aclosing(api.pieces(job, index)) as given:
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


def _client_of(request: Request) -> str:
    """Who asks: a key where there are keys, and the address."""
    host = request.client.host if request.client is not None else ""
    return f"{request.headers.get('authorization', '')} {host}"


def _word_of(speaker: Speaker) -> Callable[[int], str]:
    """Return what writes one token of a model as text."""
    sessions = getattr(speaker, "sessions", None)
    tokenizer = getattr(speaker, "tokenizer", None) if sessions is None else None
    tokenizer = tokenizer if sessions is None else sessions.processor.tokenizer
    return str if tokenizer is None else lambda token: tokenizer.decode([token])
