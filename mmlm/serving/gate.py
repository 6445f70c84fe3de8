"""Who may come in, and what they are told if not: keys, sizes, and every fault as JSON.

    a client ──► gate ──► openai_api
                 you are here

Errors have the form that OpenAI's clients read, with the status that says best what to do:
400 for what the client can mend, 401 without a key, 404 for an unknown model, 413 for too much,
422 for a picture that cannot be had, 429 and 503 for "later". What was sent is never given back.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmlm.errors import CheckpointError, ImageError, MMLMError
from mmlm.serving.engine import EngineGoneError, in_words
from mmlm.serving.fetch import FetchError
from mmlm.serving.metrics import Metrics
from mmlm.serving.openai_schema import error_body


class RefusalError(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


def answer_to(fault: BaseException) -> tuple[int, dict[str, Any]]:
    """Return the status and the body for whatever went wrong."""
    if isinstance(fault, RequestValidationError):
        return 400, error_body(_complaints(fault), _kind(400))
    if isinstance(fault, HTTPException):
        return fault.status_code, error_body(str(fault.detail), _kind(fault.status_code))
    if isinstance(fault, RefusalError):
        return fault.status, error_body(fault.message, _kind(fault.status), fault.code)
    if isinstance(fault, FetchError):
        return fault.status, error_body(str(fault), _kind(fault.status), "image")
    if isinstance(fault, CheckpointError):  # the model is at fault, not the request
        return 500, error_body(str(fault), _kind(500), "model")
    if isinstance(fault, EngineGoneError):
        return 503, error_body(str(fault), _kind(503), "engine")
    if isinstance(fault, MMLMError):
        code = "image" if isinstance(fault, ImageError) else None
        return 400, error_body(str(fault), _kind(400), code)
    words = in_words(fault)
    full = isinstance(fault, MemoryError) or type(fault).__name__ == "OutOfMemoryError"
    status = 503 if full else 500
    return status, error_body(words, _kind(status), "out_of_memory" if full else None)


def _kind(status: int) -> str:
    names = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    return names.get(status, "invalid_request_error" if status < 500 else "server_error")


def response_to(fault: Exception, metrics: Metrics) -> Response:
    """Return the response to whatever went wrong, and count it."""
    status, body = answer_to(fault)
    metrics.request(status)
    # A 405 says in `Allow` what may be asked instead.
    headers = dict(fault.headers or {}) if isinstance(fault, HTTPException) else {}
    if status in (429, 503):
        headers["Retry-After"] = "2"
    return JSONResponse(body, status, headers)


def explain_errors(app: FastAPI, metrics: Metrics) -> None:
    """Answer every fault with JSON in the form that clients read."""

    async def explain(request: Request, fault: Exception) -> Response:
        return response_to(fault, metrics)

    for kind in (RequestValidationError, HTTPException, RefusalError, MMLMError, Exception):
        app.add_exception_handler(kind, explain)


def _complaints(fault: RequestValidationError) -> str:
    """Name every field that is wrong, without giving back what was sent."""
    faults = fault.errors()[:8]
    told = [f"{'.'.join(str(part) for part in e['loc'][1:]) or 'body'}: {e['msg']}" for e in faults]
    return "; ".join(told)[:2000]


class Guard:
    """Checks the key and the size of a request before anything reads it.

    Args:
        app: What comes behind.
        metrics: Counts those who are turned away.
        max_body_bytes: Most bytes of a request.
        keys: The keys of clients; empty lets everybody in.
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, max_body_bytes: int, keys: Sequence[bytes]
    ) -> None:
        self._app, self._metrics, self._keys = app, metrics, keys
        self._most = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] != "http" or not scope["path"].startswith(("/v1/", "/metrics")):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if self._keys and not self._knows(headers.get("authorization", "")):
            words = "A valid API key is needed: Authorization: Bearer KEY."
            await self._refuse(401, words, scope, receive, send)
            return
        most = self._most
        told = headers.get("content-length", "0")
        if not told.isdecimal() or int(told) > most:
            await self._refuse(413, f"A request may have {most:,} bytes.", scope, receive, send)
            return
        await self._app(scope, _counted(receive, most), send)

    def _knows(self, header: str) -> bool:
        kind, _, key = header.partition(" ")
        given = key.strip().encode()
        # Every key is compared, so that the time tells nothing about which one was near.
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        return kind.lower() == "bearer" and any(matches)

    async def _refuse(
        self, status: int, words: str, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self._metrics.request(status)
        await JSONResponse(error_body(words, _kind(status)), status)(scope, receive, send)


def _counted(receive: Receive, most: int) -> Receive:
    """Count the bytes of a body that comes in pieces, whatever its header said."""
    size = 0

    async def read() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > most:
            raise HTTPException(413, f"A request may have {most:,} bytes.")
        return message

    return read
