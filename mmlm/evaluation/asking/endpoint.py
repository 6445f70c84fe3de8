"""Asks a model behind an OpenAI-compatible address: ours, vLLM's, or a hosted one.

    runner ──► EndpointBackend ──► POST …/chat/completions, several at once
               you are here

Texts come back and nothing else, so choices cannot be decided by likelihood here. What the
model is made of cannot be seen from outside: answers are kept under the address, the model's
name and what the server says of it. After a change behind the address, start with `fresh`.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mmlm.errors import EvaluationError, ImageError
from mmlm.evaluation.asking.answers import hashed
from mmlm.evaluation.asking.chat_client import ChatClient
from mmlm.evaluation.benchmarks.conditions import Case
from mmlm.generation import GenerationSettings
from mmlm.images import open_image

_FACTS = ("id", "root", "owned_by", "max_model_len")
_KINDS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}


class EndpointBackend:
    """A model behind an address.

    Args:
        url: The address up to ``/v1``, such as ``http://localhost:8000/v1``.
        model: The model's name there; the first that the server lists when left out.
        key: The key that it asks for.
        at_once: Requests in flight.
        timeout_seconds: How long one answer may take.
        wait_seconds: The first pause before a busy server is asked again; it doubles.
    """

    def __init__(
        self,
        url: str,
        model: str = "",
        *,
        key: str = "",
        at_once: int = 8,
        timeout_seconds: float = 600.0,
        wait_seconds: float = 1.0,
    ) -> None:
        self._client = ChatClient(
            url, key=key, timeout_seconds=timeout_seconds, wait_seconds=wait_seconds
        )
        self._at_once = at_once
        told = self._client.models()
        self.model = model or next(iter(told), "")
        if self.model not in told:
            raise EvaluationError(
                f"{self._client.url} serves no model {self.model!r}; it lists "
                f"{', '.join(told) or 'none'}."
            )
        # `created` is the start of the server in some, which would forget answers for nothing.
        facts = {name: told[self.model].get(name) for name in _FACTS}
        self.weights = hashed(f"endpoint {self._client.url} {json.dumps(facts, default=str)}")

    def answer(self, cases: Sequence[Case], settings: GenerationSettings) -> list[str]:
        """Answer cases, several at once, in their order.

        Raises:
            EvaluationError: if the server refuses one, or does not come back.
        """
        options = _options(settings)
        with ThreadPoolExecutor(self._at_once) as pool:
            return list(pool.map(lambda case: self._one(case, options), cases))

    def likelihoods(self, cases: Sequence[Case]) -> list[list[float]]:
        """Refuse: a chat endpoint does not say how likely a given text is."""
        raise EvaluationError(
            f"{self._client.url} gives texts and no likelihoods. Use decide: generate, or load "
            f"the model."
        )

    def _one(self, case: Case, options: dict[str, Any]) -> str:
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": data_url(image)}} for image in case.images
        ]
        content.append({"type": "text", "text": case.prompt})
        return self._client.ask(self.model, [{"role": "user", "content": content}], options)


def _options(settings: GenerationSettings) -> dict[str, Any]:
    """Return settings in the words of the API.

    Raises:
        EvaluationError: for a setting that the API does not have.
    """
    if settings.num_beams > 1 or settings.repetition_penalty != 1.0 or settings.top_k:
        raise EvaluationError(
            "An endpoint takes no num_beams, repetition_penalty or top_k; take them out of "
            "`generate`, or load the model."
        )
    options: dict[str, Any] = {
        "max_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
    }
    if settings.stop:
        options["stop"] = list(settings.stop)
    if settings.seed is not None:
        options["seed"] = settings.seed
    return options


def data_url(picture: Any) -> str:
    """Put a picture into an address: files of the usual kinds as they are, others as PNG.

    Raises:
        EvaluationError: if it cannot be opened.
    """
    try:
        content = picture.read_bytes() if isinstance(picture, Path) else picture
        kind = next((kind for head, kind in _KINDS.items() if _starts(content, head)), None)
        if kind is None:
            buffer = io.BytesIO()
            open_image(picture).save(buffer, "PNG")
            content, kind = buffer.getvalue(), "png"
    except (OSError, ImageError) as error:
        raise EvaluationError(f"The picture {picture!s:.80} cannot be shown: {error}") from None
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _starts(content: Any, head: bytes) -> bool:
    return isinstance(content, bytes) and content.startswith(head)
