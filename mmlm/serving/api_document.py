"""What the OpenAPI document says that the API answers: bodies, kinds of content, errors.

    openai_schema (what may be asked), api_document (what is answered) ──► /openapi.json
                                       you are here

The bodies are built in `openai_schema`; here stands their form, for clients that are generated
from the document. `tests/serving/test_openapi.py` asks the server whether the two agree.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

_ERRORS = {
    400: "The request is wrong in a way that the client can mend.",
    401: "A key is needed.",
    404: "No model has this name.",
    413: "The request, or a picture in it, is too large.",
    422: "A picture cannot be had from its address.",
    429: "Too many requests are in line; come back after `Retry-After` seconds.",
    500: "The model failed.",
    503: "The server is full, about to stop, or its engine is gone; come back later.",
}


class Fault(BaseModel):
    """What went wrong."""

    message: str
    """In words for people."""

    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error."""

    error: Fault


class State(BaseModel):
    """How the server is."""

    status: Literal["ok", "ready", "loading", "draining"]


class ModelRow(BaseModel):
    """A model that can be named in a request."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    """All models."""

    object: Literal["list"]
    data: list[ModelRow]


class Said(BaseModel):
    """A message of the model."""

    role: Literal["assistant"]
    content: str
    refusal: str | None


class Choice(BaseModel):
    """One answer."""

    index: int
    message: Said
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]


class Cost(BaseModel):
    """What a request cost, in tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


class Completion(BaseModel):
    """The body of an answer that is not streamed."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Cost


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the responses of some statuses, all with an `ErrorBody`."""
    return {status: {"model": ErrorBody, "description": _ERRORS[status]} for status in statuses}


MODEL = errors(401, 404, 422)
"""Errors when one model is asked for."""

CHAT: dict[int | str, dict[str, Any]] = {
    200: {
        "model": Completion,
        "description": "The answer; with `stream`, events as they come, and [DONE] at the end.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    },
    **errors(400, 401, 404, 413, 422, 429, 500, 503),
}
"""The responses to a conversation."""

READY: dict[int | str, dict[str, Any]] = {
    503: {"model": State, "description": "Not now: the server is loading or about to stop."}
}
"""The responses to whether requests are taken."""
