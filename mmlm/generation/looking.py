"""Which places of the pictures an answer looked at, found out after the answer was given.

    Sessions ──► look(messages, answer) ──► one row of attention for each token of the answer
                 you are here

While an answer is generated attention stays as fast as it is: no weights are kept. Afterwards
the answer is read once more behind the cache of its conversation, and only then the rows of
its own tokens are computed (`q · Kᵀ`, softmax, mean over heads and over the upper half of the
layers). The row of a token is that of the position which chose it.

Attention says where a model took something from, not why it said what it said; and much of it
rests on tokens that mean nothing. Read a map beside those of other words.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmlm.errors import MMLMError
from mmlm.generation.session import Sessions, can_crop
from mmlm.generation.settings import GenerationSettings
from mmlm.generation.words import Words
from mmlm.messages import Message

WATCHED = "mmlm_watched"
MOST_TOKENS = 256
"""Of a longer answer the beginning is looked at."""


@dataclass(frozen=True)
class Look:
    """What the tokens of an answer looked at.

    Shapes:
        heat: ``(answer_tokens, image_tokens)``, shares of attention; a row sums to less than 1,
            the rest went to text
    """

    tokens: list[str]
    """The answer, token by token."""

    heat: Tensor
    spans: list[tuple[int, int]] = field(default_factory=list)
    """Where the tokens of each picture begin and end among the columns of `heat`."""


class Watch:
    """Gathers the rows of some layers.

    Args:
        columns: The positions whose weights are kept.
    """

    def __init__(self, columns: Tensor) -> None:
        self._columns = columns
        self._layers: list[Tensor] = []

    def add(self, query: Tensor, key: Tensor, scaling: float | None) -> None:
        """Compute the weights of one layer.

        Shapes:
            query: ``(1, heads, rows, head_width)``
            key: ``(1, key_heads, positions, head_width)``
        """
        rows, length = query.shape[2], key.shape[2]
        keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).float()
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        places = torch.arange(length, device=query.device)
        future = places[None] > places[length - rows :, None]
        total = torch.zeros(rows, len(self._columns), device=query.device)
        for head in range(query.shape[1]):  # one head at a time bounds the memory
            scores = query[0, head].float() @ keys[0, head].T * scale
            weights = scores.masked_fill(future, -torch.inf).softmax(-1)
            total += weights[:, self._columns]
        self._layers.append(total / query.shape[1])

    def heat(self) -> Float[Tensor, "rows columns"]:
        """Return the mean over the upper half of the layers.

        Raises:
            MMLMError: if no layer was watched.
        """
        if not self._layers:
            raise MMLMError(
                "This language model does not show its attention (it has none, or computes it in "
                "a way of its own), so there is no map of what it looked at."
            )
        return torch.stack(self._layers[len(self._layers) // 2 :]).mean(0).cpu()


def look(sessions: Sessions, messages: Sequence[Message], answer: str) -> Look:
    """Find out what the tokens of an answer looked at.

    Args:
        sessions: The model, and the cache of the conversation where it is kept.
        messages: The conversation up to the question.
        answer: What was answered.

    Raises:
        MMLMError: if the model shows no attention, or there is nothing to look at.
    """
    tokenizer: Any = sessions.processor.tokenizer
    ids: list[int] = tokenizer(answer, add_special_tokens=False)["input_ids"][:MOST_TOKENS]
    answering = sessions.begin(messages, GenerationSettings(max_new_tokens=max(len(ids), 1)))
    spans = answering.prompt.image_spans
    try:
        if not ids or not spans:
            raise MMLMError("There is nothing to look at: a picture and an answer are needed.")
        ids = ids[: answering.limit]
        sessions.prefill(answering)
        kept = answering.kept
        if not can_crop(kept.cache):
            raise MMLMError("This language model forgets positions, so there is no map of them.")
        kept.cache.crop(-1)  # the last token of the question is read again: it chose the first word
        last = kept.keys.pop()
        columns = torch.cat([torch.arange(first, end) for first, end in spans])
        watch = Watch(columns.to(sessions.model.device))
        rows = torch.tensor([[last, *ids[:-1]]], device=sessions.model.device)
        with sessions.using(), _watched(sessions.model.model.language):
            sessions.read(kept, rows, None, watch=watch)
        kept.keys += [last, *ids[:-1]]
    finally:
        sessions.end(answering)
    borders: list[tuple[int, int]] = []
    for first, end in spans:
        start = borders[-1][1] if borders else 0
        borders.append((start, start + end - first))
    return Look(_spelt(tokenizer, ids), watch.heat(), borders)


def _spelt(tokenizer: Any, ids: list[int]) -> list[str]:
    """Write every token; a letter of several tokens stands at the last of them."""
    words = Words(tokenizer)
    spelt = [words.add(token) for token in ids]
    spelt[-1] += words.rest()
    return spelt


@contextmanager
def _watched(language: nn.Module) -> Generator[None]:
    """Let a language model's layers show their queries and keys."""
    config: Any = language.config
    before = config._attn_implementation
    config._attn_implementation = WATCHED
    try:
        yield
    finally:
        config._attn_implementation = before


def _watched_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, watch: Watch | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    if watch is not None:
        watch.add(query, key, scaling)
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )


ALL_ATTENTION_FUNCTIONS.register(WATCHED, _watched_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(WATCHED, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
