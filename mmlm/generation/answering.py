"""One answer while it grows: its cache, its tokens, its words, and what it costs.

`Sessions` (see `mmlm.generation.session`) makes an `Answering` and computes; the answering
chooses, counts and spells. It knows no model, so that one forward may serve several of them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mmlm.generation.choosing import Chooser
from mmlm.generation.json_form import JsonForm
from mmlm.generation.words import Words
from mmlm.processing import Encoded

Key = int | tuple[bytes, int]
"""What makes a position: its token, or which picture and which of its tokens."""


@dataclass
class Usage:
    """What an answer cost, filled in while it is generated."""

    num_prompt_tokens: int = 0
    """Tokens of the conversation, image tokens included."""

    num_image_tokens: int = 0
    """Those that stand for images."""

    num_cached_tokens: int = 0
    """Those that were found in a kept cache and not computed."""

    num_tokens: int = 0
    """Tokens of the answer."""

    first_token_seconds: float = 0.0
    """Time from the request to the first token."""

    seconds: float = 0.0
    """Time from the request to the last token."""

    finish_reason: str = "stopped"
    """``"stop"``: the model ended its turn; ``"length"``: a limit did; ``"stopped"``: somebody."""

    @property
    def tokens_per_second(self) -> float:
        """Speed after the first token."""
        waited = self.seconds - self.first_token_seconds
        return (self.num_tokens - 1) / waited if waited > 0 and self.num_tokens > 1 else 0.0


@dataclass(frozen=True)
class Piece:
    """A part of an answer. The text may be empty: a token need not complete a letter."""

    text: str
    usage: Usage
    """The same object in every piece of an answer; final after the last one."""

    token_id: int | None = None
    """The token, or None where the piece is what was held back till the end."""

    logprob: float | None = None
    """Its log-probability under the model, before temperature and the like."""

    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens at this place with their log-probabilities, as many as asked for."""


@dataclass
class Kept:
    """A key-value cache and what its positions are."""

    cache: Any
    keys: list[Key] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """The memory of the keys and values."""
        held = (value for layer in self.cache.layers for value in vars(layer).values())
        return sum(t.numel() * t.element_size() for t in held if isinstance(t, Tensor))


@dataclass
class Answering:
    """One answer while it is generated; `Sessions.begin` makes it.

    Whoever steps the model hands it the next logits, and it chooses, counts and spells.
    """

    prompt: Encoded
    """The conversation."""

    keys: list[Key]
    """What makes each position of the prompt."""

    pictures: list[Any]
    """Its pictures, in reading order."""

    start: int
    """How many positions were found in the kept cache."""

    kept: Kept
    """The cache of the conversation so far."""

    usage: Usage
    """What it costs, so far."""

    chooser: Chooser
    words: Words
    stop_ids: frozenset[int]

    limit: int
    """Most tokens of the answer."""

    num_top: int
    began: float
    form: JsonForm | None = None

    visual_tokens: int | None = None
    """How many tokens of each picture are shown; None for all."""

    ended: bool = False
    """Whether no token follows."""

    token: int = -1
    """The token that was taken last; the model reads it next."""

    def take(self, logits: Tensor) -> Piece | None:
        """Choose the next token; None if it ends the turn.

        Shapes:
            logits: ``(1, vocabulary)``
        """
        usage, form = self.usage, self.form
        allows = None if form is None else form.allows
        self.token, logprob, top = self.chooser.choose(logits, self.num_top, allows)
        usage.seconds = time.perf_counter() - self.began
        usage.first_token_seconds = usage.first_token_seconds or usage.seconds
        if self.token in self.stop_ids:  # the end of the turn is no word
            usage.finish_reason, self.ended = "stop", True
            return None
        usage.num_tokens += 1
        text = self.words.add(self.token)
        if form is not None:
            form.add(self.token)
        if self.words.ended or (form is not None and form.complete):
            usage.finish_reason = "stop"
        elif usage.num_tokens == self.limit:
            usage.finish_reason = "length"
        self.ended = usage.finish_reason != "stopped"
        return Piece(text, usage, self.token, logprob, top)

    def rest(self) -> Piece:
        """Return what was held back, after the last token."""
        return Piece(self.words.rest(), self.usage)
