"""Speaks with an OpenAI-compatible address, patiently: for models behind one, and for judges.

Nothing here knows a benchmark. A busy or silent server is asked again a few times, with longer
and longer pauses; every other refusal is an error that holds what the server said.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from mmlm.errors import EvaluationError

_TRIES = 5
_BUSY = frozenset({408, 429, 500, 502, 503, 504})


class ChatClient:
    """A client of one address.

    Args:
        url: The address up to ``/v1``, such as ``http://localhost:8000/v1``.
        key: The key that it asks for.
        timeout_seconds: How long one answer may take.
        wait_seconds: The first pause before a busy server is asked again; it doubles.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str = "",
        timeout_seconds: float = 600.0,
        wait_seconds: float = 1.0,
    ) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(headers=headers, timeout=timeout_seconds)
        self.url, self._wait = url.rstrip("/"), wait_seconds

    def models(self) -> dict[str, dict[str, Any]]:
        """Return what the server says of each of its models, by name.

        Raises:
            EvaluationError: if it is no such server.
        """
        rows = self.send("GET", "/models").get("data")
        if not isinstance(rows, list):
            raise EvaluationError(f"{self.url}/models is no list of models. Is it an OpenAI API?")
        return {str(row["id"]): dict(row) for row in rows}

    def ask(
        self, model: str, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
    ) -> str:
        """Return the answer to a conversation.

        Raises:
            EvaluationError: if there is none.
        """
        body = {"model": model, "messages": list(messages), **options}
        told = self.send("POST", "/chat/completions", body)
        try:
            return str(told["choices"][0]["message"]["content"] or "").strip()
        except (KeyError, IndexError, TypeError):
            raise EvaluationError(
                f"{self.url} answered with no message (got {told!s:.200})."
            ) from None

    def send(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """Send one request and return the JSON that comes back."""
        problem = ""
        for attempt in range(_TRIES):
            try:
                answer = self._client.request(method, self.url + path, json=body)
            except httpx.HTTPError as error:
                problem = f"cannot be reached: {error or type(error).__name__}"
            else:
                if answer.is_success:
                    return _json_of(answer, self.url + path)
                problem = f"says {answer.status_code}: {answer.text[:300]}"
                if answer.status_code not in _BUSY:
                    break
            if attempt + 1 < _TRIES:
                time.sleep(self._wait * 2**attempt)
        raise EvaluationError(f"{self.url}{path} {problem}. The answers so far are kept.")


def _json_of(answer: httpx.Response, address: str) -> dict[str, Any]:
    try:
        return dict(answer.json())
    except (ValueError, TypeError):
        said = answer.text[:200]
        raise EvaluationError(f"{address} did not answer with JSON: {said!r}.") from None
