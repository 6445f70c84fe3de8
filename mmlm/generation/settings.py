"""What is asked, and how it is to be answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from mmlm.config import Config
from mmlm.messages import Message, user


class GenerationSettings(Config):
    """How an answer is generated. The default is greedy: the same answer every time."""

    max_new_tokens: int = Field(default=256, ge=1)
    """Most tokens of an answer."""

    temperature: float = Field(default=0.0, ge=0.0)
    """0 takes the likeliest token; 1 samples from the model's own distribution."""

    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Sample among the likeliest tokens that together have this probability."""

    top_k: int = Field(default=0, ge=0)
    """Sample among this many likeliest tokens; 0 is all."""

    num_beams: int = Field(default=1, ge=1)
    """Width of the beam search; 1 is none."""

    repetition_penalty: float = Field(default=1.0, gt=0.0)
    """Above 1, words that stand already become less likely."""

    stop: tuple[str, ...] = ()
    """The answer ends before the first of these strings."""

    visual_tokens: int | None = Field(default=None, ge=1)
    """Show the model this many first tokens of each picture; for connectors that order them."""

    seed: int | None = None
    """Makes sampling repeatable."""

    def for_generate(self) -> dict[str, Any]:
        """Return the arguments of transformers' `generate`."""
        options: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "num_beams": self.num_beams,
            "do_sample": self.temperature > 0,
            "repetition_penalty": self.repetition_penalty,
            # Settings of a base model's generation_config.json would change a greedy answer.
            "temperature": self.temperature if self.temperature > 0 else None,
            "top_p": self.top_p if self.temperature > 0 else None,
            "top_k": self.top_k if self.temperature > 0 else None,
        }
        return options


@dataclass(frozen=True)
class Request:
    """One thing to be answered: a conversation, or a question with images.

    Args:
        question: The question; ignored where `messages` are given.
        images: Its images, put before the question.
        messages: A whole conversation that ends with a user turn.
    """

    question: str = ""
    images: Sequence[Any] = ()
    messages: tuple[Message, ...] = field(default=())

    def conversation(self) -> tuple[Message, ...]:
        """Return the request as messages."""
        return tuple(self.messages) or (user(self.question, self.images),)
