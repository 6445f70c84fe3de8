"""A model that another OpenAI server runs, spoken to as if it were here.

    chat_ui, openai_api ──► Behind ──► vLLM, or any OpenAI-compatible server on this machine
                            you are here

What strangers send is checked and opened by our own front first (see `fetch` and `gate`); the
server behind gets pictures that were decoded here and written anew as PNG, never an address and
never a stranger's bytes. Words that its tokenizer would read as control (`<image>`,
`<|im_end|>`) are broken by an invisible sign, because its chat template knows no other way.

Closing an answer closes its connection, which is how such servers learn that nobody listens.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import re
import socket
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any
from urllib.parse import urlsplit

from mmlm.errors import MMLMError, UsageError
from mmlm.generation import GenerationSettings
from mmlm.generation.session import Piece, Usage
from mmlm.images import open_image
from mmlm.messages import ImagePart, Message
from mmlm.serving.about import About
from mmlm.serving.engine import EngineGoneError

_LOOK_SECONDS = 0.05
"""How long a stop may stay unseen while nothing comes."""

_BREAK = "\u2060"
"""A word joiner: nobody sees it, and no control word holds one."""


class Behind:
    """A model behind another server.

    Args:
        name: What it is called here.
        address: The server's address up to the path, such as ``http://127.0.0.1:8001``.
        model: What it is called there; the same when left out.
        key: The key that the server asks for.
        about: What it tells about itself.
        control: The words that its tokenizer reads as control.
        tokenizer: Writes a token as text, where the server tells token ids.
        timeout_seconds: Longest wait for the next piece.
    """

    def __init__(
        self, name: str, address: str, *, model: str | None = None, key: str = "",
        about: About | None = None, control: Sequence[str] = (), tokenizer: Any = None,
        timeout_seconds: float = 300.0,
    ) -> None:  # fmt: skip
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"The engine's address must be http://HOST:PORT (got {address!r}).")
        self.name, self.about = name, about or About(title=name)
        self.tokenizer = tokenizer
        self._parts, self._model, self._key = parts, model or name, key
        self._timeout = timeout_seconds
        self._open = 0
        self._guard = threading.Lock()
        words = "|".join(map(re.escape, sorted(control, key=len, reverse=True)))
        self._control = re.compile(words) if words else None

    @property
    def is_idle(self) -> bool:
        """Whether nothing is answered."""
        return self._open == 0

    @property
    def is_ready(self) -> bool:
        """Whether the server behind answers."""
        connection = self._connection(timeout_seconds=2.0)
        try:
            connection.request("GET", self._path("/health"), headers=self._headers())
            return connection.getresponse().status < 500
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def stream(
        self,
        messages: Sequence[Message],
        settings: GenerationSettings,
        stop_event: threading.Event | None = None,
        *,
        num_top: int = 0,
        as_json: bool = False,
        client: str = "",
    ) -> Generator[Piece]:
        """Answer piece by piece; closing the generator or setting the event ends the answer.

        Raises:
            EngineGoneError: if the server behind does not answer.
            MMLMError: with its own words, if it refuses the conversation.
        """
        del client  # the server behind has its own order
        body = self._body(messages, settings, num_top, as_json)
        usage = Usage()
        began = time.perf_counter()
        line = _Line(self._connection(self._timeout), self._path("/v1/chat/completions"))
        with self._guard:
            self._open += 1
        try:
            for event in line.events(body, self._headers(), stop_event):
                yield from self._pieces(event, usage, began)
            yield Piece("", usage)
        finally:
            line.close()
            with self._guard:
                self._open -= 1

    def _pieces(self, event: dict[str, Any], usage: Usage, began: float) -> Iterator[Piece]:
        """Turn one event into pieces, and note what the answer costs."""
        if "error" in event:
            raise _refusal(400, event)
        _count(usage, event.get("usage"))
        for choice in event.get("choices") or ():
            reason = choice.get("finish_reason")
            if reason:
                usage.finish_reason = "length" if reason == "length" else "stop"
            text = (choice.get("delta") or {}).get("content") or ""
            told = ((choice.get("logprobs") or {}).get("content")) or [None]
            if not text and told == [None]:
                continue
            usage.seconds = time.perf_counter() - began
            usage.first_token_seconds = usage.first_token_seconds or usage.seconds
            for number, token in enumerate(told):
                usage.num_tokens += 1
                yield _piece(text if number == 0 else "", usage, token)

    def _body(
        self, messages: Sequence[Message], settings: GenerationSettings, num_top: int, as_json: bool
    ) -> bytes:
        values: dict[str, Any] = {
            "model": self._model,
            "messages": [self._turn(message) for message in messages],
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "repetition_penalty": settings.repetition_penalty,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        optional: dict[str, Any] = {
            "top_k": settings.top_k or None,
            "stop": list(settings.stop) or None,
            "seed": settings.seed,
            "response_format": {"type": "json_object"} if as_json else None,
        }
        if num_top:
            # Token ids instead of their text: vLLM's own word, unknown elsewhere and ignored there.
            optional |= {"logprobs": True, "top_logprobs": num_top}
            optional["return_tokens_as_token_ids"] = True
        values |= {key: value for key, value in optional.items() if value is not None}
        return json.dumps(values).encode()

    def _turn(self, message: Message) -> dict[str, Any]:
        if not message.images:
            return {"role": message.role, "content": self._plain(message.text)}
        content: list[dict[str, Any]] = []
        for part in message.content:
            if isinstance(part, ImagePart):
                content.append({"type": "image_url", "image_url": {"url": _as_data(part.image)}})
            else:
                content.append({"type": "text", "text": self._plain(part.text)})
        return {"role": message.role, "content": content}

    def _plain(self, text: str) -> str:
        """Break what the server's tokenizer would read as control."""
        if self._control is None:
            return text
        return self._control.sub(lambda found: f"{found[0][0]}{_BREAK}{found[0][1:]}", text)

    def _connection(self, timeout_seconds: float) -> http.client.HTTPConnection:
        secure = self._parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        host = str(self._parts.hostname)
        return kind(host, self._parts.port, timeout=timeout_seconds)

    def _path(self, path: str) -> str:
        return self._parts.path.rstrip("/").removesuffix("/v1") + path

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json"}
        return {**headers, "Authorization": f"Bearer {self._key}"} if self._key else headers


class _Line:
    """One request and the events of its answer, read in a thread so that a stop is seen at once."""

    def __init__(self, connection: http.client.HTTPConnection, path: str) -> None:
        self._connection, self._path = connection, path
        self._socket: socket.socket | None = None
        self._found: SimpleQueue[dict[str, Any] | BaseException | None] = SimpleQueue()

    def events(
        self, body: bytes, headers: dict[str, str], stop: threading.Event | None
    ) -> Iterator[dict[str, Any]]:
        """Send the request and give the events of the answer until it ends or is stopped."""
        threading.Thread(target=self._read, args=(body, headers), daemon=True).start()
        while stop is None or not stop.is_set():
            try:
                item = self._found.get(timeout=_LOOK_SECONDS)
            except Empty:
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        """End the connection, also under a reader that waits."""
        if self._socket is not None:
            with suppress(OSError):  # it has ended already
                self._socket.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _read(self, body: bytes, headers: dict[str, str]) -> None:
        try:
            self._connection.connect()
            self._socket = self._connection.sock
            self._connection.request("POST", self._path, body, headers)
            response = self._connection.getresponse()
            if response.status != 200:
                raise _refusal(response.status, _json(response.read(100_000)))
            for line in response:
                if line.startswith(b"data:") and line[5:].strip() != b"[DONE]":
                    self._found.put(_json(line[5:]))
            self._found.put(None)
        except MMLMError as fault:
            self._found.put(fault)
        except (OSError, http.client.HTTPException, ValueError) as fault:
            words = f"The engine behind this server does not answer ({type(fault).__name__})."
            self._found.put(EngineGoneError(f"{words} Try again later."))


def _refusal(status: int, body: dict[str, Any]) -> MMLMError:
    """Return what a server's error means here: the request's fault, or the server's."""
    error = body.get("error")
    told = error.get("message") if isinstance(error, dict) else body.get("message")
    words = str(told or f"status {status}")[:500]
    if status in (400, 413, 422):
        return MMLMError(f"The engine refuses this conversation: {words}")
    return EngineGoneError(f"The engine behind this server failed: {words}")


def _json(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _count(usage: Usage, told: Any) -> None:
    """Note the counts that the server tells at the end."""
    if not isinstance(told, dict):
        return
    usage.num_prompt_tokens = int(told.get("prompt_tokens") or 0)
    usage.num_tokens = int(told.get("completion_tokens") or usage.num_tokens)
    details = told.get("prompt_tokens_details") or {}
    usage.num_cached_tokens = int(details.get("cached_tokens") or 0)


def _piece(text: str, usage: Usage, told: dict[str, Any] | None) -> Piece:
    if told is None:
        return Piece(text, usage)
    top = tuple(
        (ident, float(entry["logprob"]))
        for entry in told.get("top_logprobs") or ()
        if (ident := _token_id(entry)) is not None
    )
    return Piece(text, usage, _token_id(told), float(told.get("logprob") or 0.0), top)


def _token_id(told: dict[str, Any]) -> int | None:
    """Return the id that vLLM writes as ``token_id:123``; None where it is the text."""
    kind, _, number = str(told.get("token")).partition(":")
    return int(number) if kind == "token_id" and number.isdecimal() else None


def _as_data(source: Any) -> str:
    """Decode a picture and write it anew."""
    file = io.BytesIO()
    open_image(source).save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
