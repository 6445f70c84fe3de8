"""Choosing which encoders of a mixture look at a picture (MoVA, arXiv 2404.13046, section 3.2).

    `RoutingWords`   the tokens with which the language model is asked, around the question
    `Choice`         what was chosen, tile by tile
    `only`           lets a mixture run the chosen experts alone

Who asks is `mmlm.modeling.routing`; nothing here knows a language model. MoVA's list of letters and
sentences stays as it is in the paper's idea: each expert has a letter and a sentence about what it
is good at.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from mmlm.config import Config
from mmlm.errors import ConfigError
from mmlm.features import Grid, VisionFeatures

NOTHING = Grid(1, 0, 0)
"""The grid of a picture that an expert did not look at."""

NONE = "none"
"""What is answered where no expert is needed."""

_QUESTION = "\u2042question\u2042"
_ASK = (
    "Below are experts that can look at this picture for you, and a question about it. Choose the "
    "experts whose skill helps to answer the question. Answer with their letters alone, or with "
    "'none'.\nExperts:\n{experts}\n\nQuestion:\n{question}"
)


class RoutingWords(Config):
    """The tokens of a prompt that asks which experts a question about a picture needs."""

    head: tuple[int, ...]
    """Before the picture."""

    middle: tuple[int, ...]
    """Between the picture and the question: the list of experts."""

    tail: tuple[int, ...]
    """Behind the question: the end of its turn, and the beginning of an answer."""

    letters: tuple[int, ...]
    """The token of each expert's letter."""

    none: int
    """The token that says that none is needed."""


@dataclass(frozen=True)
class Choice:
    """Which experts look at which tiles; all look at all where nothing is said."""

    tiles: Sequence[Collection[int]] | None = None
    """The experts of each tile, from 0: the second encoder of the mixture."""

    base: VisionFeatures | None = None
    """What the first encoder gave, where it has run already."""


@contextmanager
def only(mixture: Any, choice: Choice) -> Generator[None]:
    """Let a mixture run the chosen experts alone."""
    before, mixture.choice = mixture.choice, choice
    try:
        yield
    finally:
        mixture.choice = before


def check_experts(encoders: Sequence[dict[str, Any]]) -> None:
    """Refuse a mixture without experts, or with one that says nothing about itself.

    Raises:
        ValueError: for pydantic, which names the part of the recipe.
    """
    if not 2 <= len(encoders) <= len(ascii_uppercase) + 1:
        raise ValueError("`fuse: experts` needs a base and one to 26 experts behind it")
    for number, words in enumerate(encoders[1:], start=1):
        if not isinstance(words.get("about"), str) or not words["about"].strip():
            raise ValueError(
                f"encoders[{number}] needs `about`, a sentence about what it is good at, by which "
                f"the language model chooses it"
            )


def routing_words(tokenizer: Any, template: str | None, about: Sequence[str]) -> RoutingWords:
    """Return the tokens of the prompt, in the chat format of a language model.

    Raises:
        ConfigError: if letters share a token, or the template leaves the picture or question out.
    """
    from mmlm.language import ChatFormat
    from mmlm.messages import user

    listed = "\n".join(
        f"{letter}. {line}" for letter, line in zip(ascii_uppercase, about, strict=False)
    )
    chat = ChatFormat(tokenizer, template)
    text = _ASK.format(experts=listed, question=_QUESTION)
    rendered = chat.render([user(text, [None])], add_generation_prompt=True)
    head, picture, rest = rendered.partition(chat.image_token)
    middle, question, tail = rest.partition(_QUESTION)
    if not (picture and question and tail.strip()):
        raise ConfigError(
            "The chat template of this language model does not show picture, question and the "
            "beginning of an answer in this order, so that it cannot be asked for experts. Use "
            "`fuse: channels`."
        )

    def tokens(part: str) -> tuple[int, ...]:
        return tuple(tokenizer(part, add_special_tokens=False).input_ids)

    letters = tuple(tokens(letter)[-1] for letter in ascii_uppercase[: len(about)])
    none = tokens(NONE)[0]
    if len({*letters, none}) <= len(letters):
        raise ConfigError(
            "Letters share a token in the tokenizer of this language model, so that it cannot "
            "name an expert. Use `fuse: channels`."
        )
    return RoutingWords(
        head=tokens(head), middle=tokens(middle), tail=tokens(tail), letters=letters, none=none
    )
