"""The words of the OpenAI chat API: what a request may say, and what an answer looks like.

Fields that nobody here knows are ignored, as clients expect. Fields that are known and cannot
be honoured (tools, a JSON schema, penalties of another kind) are refused with the reason, so
that nobody measures something else than was asked for.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mmlm.errors import DataError
from mmlm.generation import GenerationSettings
from mmlm.generation.session import Piece, Usage
from mmlm.messages import ImagePart, Message, Part, Text

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class Asked(BaseModel):
    """A part of a request: unknown fields are ignored, known ones have the type that is told."""

    model_config = ConfigDict(extra="ignore", strict=True)


class ImageUrl(Asked):
    """Where a picture is: a `data:` address, or an `https:` one where those are allowed."""

    url: str
    detail: Literal["auto", "low", "high"] | None = "auto"
    """With ``low`` the picture is shrunk first, so that it costs fewer tokens where a model cuts
    pictures into tiles; the others show it as it is."""


class ContentPart(Asked):
    """A piece of a message."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | str | None = None


class ChatTurn(Asked):
    """One message."""

    role: str = Field(max_length=40)
    content: str | list[ContentPart] | None = None


class StreamOptions(Asked):
    """How a streamed answer ends."""

    include_usage: bool | None = False


class ResponseFormat(Asked):
    """The form of the answer."""

    type: str = Field(default="text", max_length=40)


class ChatRequest(Asked):
    """A request for an answer."""

    model: str = Field(default="", max_length=300)
    messages: list[ChatTurn] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(default=None, ge=-1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10, allow_inf_nan=False)
    visual_tokens: int | None = Field(default=None, ge=1)
    stop: str | list[str] | None = Field(default=None, max_length=16)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    n: int | None = Field(default=1, ge=1, le=8)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None

    def refusals(self) -> list[str]:
        """Say what is asked for and cannot be done."""
        reasons: list[str] = []
        if self.tools or self.functions:
            reasons.append("This server calls no tools; leave `tools` and `functions` out.")
        form = "text" if self.response_format is None else self.response_format.type
        if form not in ("text", "json_object"):
            reasons.append(
                f"response_format {form!r} cannot be promised here; json_object can: any JSON "
                f"object. Say in words what it should hold."
            )
        for name in ("frequency_penalty", "presence_penalty"):
            if getattr(self, name):
                reasons.append(f"{name} is not offered; `repetition_penalty` is (1.1, say).")
        return reasons

    @property
    def as_json(self) -> bool:
        """Whether the answer must be a JSON object."""
        return self.response_format is not None and self.response_format.type == "json_object"

    def settings(self, most_tokens: int, choice: int = 0) -> GenerationSettings:
        """Return how to answer; greedy unless a temperature is given.

        Args:
            most_tokens: The server's limit for one answer, and what is used without one.
            choice: Which of `n` answers: each draws differently, and repeatably with a seed.
        """
        wanted = self.max_completion_tokens or self.max_tokens or most_tokens
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        seed = None if self.seed is None else (self.seed + choice) % 2**63
        return GenerationSettings(
            max_new_tokens=min(wanted, most_tokens),
            temperature=self.temperature or 0.0,
            top_p=self.top_p or 1.0,
            top_k=max(self.top_k or 0, 0),
            repetition_penalty=self.repetition_penalty or 1.0,
            visual_tokens=self.visual_tokens,
            stop=tuple(text for text in stop if text),
            seed=seed,
        )


def messages_of(turns: Sequence[ChatTurn], fetch: Callable[[str, str], Any]) -> list[Message]:
    """Turn a request's messages into ours; `fetch` obtains a picture by address and detail.

    Raises:
        DataError: naming the message and the part that is wrong.
        FetchError: if a picture cannot be obtained.
    """
    messages: list[Message] = []
    for number, turn in enumerate(turns):
        where = f"messages[{number}]"
        if turn.role not in _ROLES:
            raise DataError(f"{where}.role is {turn.role!r}; known: {', '.join(_ROLES)}.")
        role: Any = _ROLES[turn.role]
        content = turn.content
        if isinstance(content, str) or content is None:
            parts: tuple[Part, ...] = (Text(content or ""),)
        else:
            parts = tuple(
                _part(piece, f"{where}.content[{place}]", role, fetch)
                for place, piece in enumerate(content)
            )
        messages.append(Message(role, parts))
    if messages[-1].role != "user":
        raise DataError(f"The last message is of role {messages[-1].role!r}; user was expected.")
    if not messages[-1].text.strip() and not messages[-1].images:
        raise DataError("The last message is empty; a question or a picture was expected.")
    return messages


def _part(piece: ContentPart, where: str, role: str, fetch: Callable[[str, str], Any]) -> Part:
    if piece.type == "text":
        if piece.text is None:
            raise DataError(f"{where} is of type text and has no text.")
        return Text(piece.text)
    if piece.image_url is None:
        raise DataError(f"{where} is of type image_url and has no image_url.")
    if role != "user":
        raise DataError(f"{where} is a picture in a message of role {role}; only users show them.")
    if isinstance(piece.image_url, str):
        return ImagePart(fetch(piece.image_url, "auto"))
    return ImagePart(fetch(piece.image_url.url, piece.image_url.detail or "auto"))


def num_pictures(turns: Sequence[ChatTurn]) -> int:
    """How many pictures a request shows, before any is obtained."""
    return sum(
        piece.type == "image_url"
        for turn in turns
        if isinstance(turn.content, list)
        for piece in turn.content
    )


def error_body(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    """Return an error as clients expect it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def usage_body(usages: Sequence[Usage]) -> dict[str, Any]:
    """Return what a request cost; the prompt counts once, however many answers it got."""
    prompt = usages[0].num_prompt_tokens if usages else 0
    said = sum(usage.num_tokens for usage in usages)
    cached = usages[0].num_cached_tokens if usages else 0
    return {
        "prompt_tokens": prompt,
        "completion_tokens": said,
        "total_tokens": prompt + said,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def finish_of(usage: Usage | None) -> str:
    """Why an answer ended, in the API's words."""
    return "length" if usage is not None and usage.finish_reason == "length" else "stop"


class Answer:
    """Builds the bodies of one answer, whole or in chunks.

    Args:
        name: The identifier of the answer.
        model: The name of the model.
        word_of: Writes a token as text.
    """

    def __init__(self, name: str, model: str, word_of: Callable[[int], str]) -> None:
        self._head = {"id": name, "created": int(time.time()), "model": model}
        self._word_of = word_of

    def whole(self, choices: Sequence[tuple[Sequence[Piece], bool]]) -> dict[str, Any]:
        """Return the body of an answer that is not streamed."""
        rows: list[dict[str, Any]] = []
        for index, (pieces, logprobs) in enumerate(choices):
            said = "".join(piece.text for piece in pieces).strip()
            rows.append(
                {
                    "index": index,
                    "message": {"role": "assistant", "content": said, "refusal": None},
                    "logprobs": {"content": self._logprobs(pieces)} if logprobs else None,
                    "finish_reason": finish_of(pieces[-1].usage if pieces else None),
                }
            )
        usages = [pieces[-1].usage for pieces, _ in choices if pieces]
        head = {**self._head, "object": "chat.completion"}
        return {**head, "choices": rows, "usage": usage_body(usages)}

    def chunk(
        self, index: int, delta: dict[str, Any], finish: str | None = None,
        pieces: Sequence[Piece] | None = None,
    ) -> str:  # fmt: skip
        """Return one event of a streamed answer."""
        logprobs = None if pieces is None else {"content": self._logprobs(pieces)}
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self.event({"choices": [choice]})

    def event(self, values: dict[str, Any]) -> str:
        """Return a server-sent event."""
        head = {**self._head, "object": "chat.completion.chunk"}
        return f"data: {json.dumps({**head, **values}, ensure_ascii=False)}\n\n"

    def _logprobs(self, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
        return [
            {
                **self._token(piece.token_id, piece.logprob or 0.0),
                "top_logprobs": [self._token(token, chance) for token, chance in piece.top],
            }
            for piece in pieces
            if piece.token_id is not None
        ]

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        word = self._word_of(token)
        # JSON knows no infinity; OpenAI writes -9999 for what is as good as impossible.
        return {
            "token": word, "logprob": max(logprob, -9999.0), "bytes": list(word.encode("utf-8")),
        }  # fmt: skip
