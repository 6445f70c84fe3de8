"""Several questions about one picture share its tokens, and do not see one another.

    picture question-1 answer-1          picture ┬ question-1 answer-1
    picture question-2 answer-2    ──►           ├ question-2 answer-2
    picture question-3 answer-3                  └ question-3 answer-3

A row of LLaVA-665K asks many unconnected questions about its picture. As one conversation each
answer sees the others; as samples of their own they pay for the picture each time. Here the part
that all have in common is written once, and every branch goes on from it: the same positions, the
same attention, the same loss as alone (Molmo's message trees, arXiv 2409.17146). Where a model or
backend cannot do that, the branches are whole samples beside one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmlm.messages import ImagePart, Message

NOT_LEARNT = -100


class Coded(NamedTuple):
    """One conversation as token ids and labels, and where its last picture ends."""

    ids: Sequence[int]
    labels: Sequence[int]
    images_end: int


class Joined(NamedTuple):
    """Conversations in one stretch of tokens.

    Shapes:
        ids, labels: ``(tokens,)``
        pieces: lengths that add up to `tokens`
        shares: whether the first piece is seen by all others
    """

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    pieces: tuple[int, ...]
    shares: bool


def parted_questions(messages: Sequence[Message]) -> list[list[Message]] | None:
    """Make a conversation of every question, over the same pictures.

    Returns:
        None where the turns cannot stand alone: there is but one question, or a picture stands
        elsewhere than before the first.
    """
    start = 1 if messages[0].role == "system" else 0
    turns = messages[start:]
    first = turns[0]
    pictures = tuple(part for part in first.content if isinstance(part, ImagePart))
    pairs = len(turns) // 2
    if pairs < 2 or len(turns) % 2 or not pictures or first.content[: len(pictures)] != pictures:
        return None
    if any(message.images for message in turns[1:]):
        return None
    found: list[list[Message]] = []
    for asked, told in zip(turns[::2], turns[1::2], strict=True):
        if asked.role != "user" or told.role != "assistant" or not (asked.learns or told.learns):
            return None
        own = tuple(part for part in asked.content if not isinstance(part, ImagePart))
        found.append([*messages[:start], Message("user", (*pictures, *own), asked.learn), told])
    return found


def join(coded: Sequence[Coded], *, share: bool) -> Joined:
    """Put conversations into one stretch; with `share`, what they have in common once.

    The common part ends before anything that is learnt, and before the token that predicts it,
    so that every label has its own predecessor.
    """
    common = _common(coded) if share and len(coded) > 1 else 0
    if common < max(one.images_end for one in coded):
        common = 0
    heads = [coded[0].ids[:common]] if common else []
    ids = [*heads, *(one.ids[common:] for one in coded)]
    labels = [[NOT_LEARNT] * common] if common else []
    for one in coded:
        rest = list(one.labels[common:])
        labels.append([NOT_LEARNT, *rest[1:]])
    return Joined(
        np.concatenate([np.array(part, dtype=np.int64) for part in ids]),
        np.concatenate([np.array(part, dtype=np.int64) for part in labels]),
        tuple(len(part) for part in ids),
        common > 0,
    )


def _common(coded: Sequence[Coded]) -> int:
    """Return how many tokens all have in common and none learns, one before the first that does."""
    least = min(len(one.ids) for one in coded)
    for one in coded:
        learnt = next((n for n, label in enumerate(one.labels) if label != NOT_LEARNT), least)
        least = max(0, min(least, learnt - 1))
    first = coded[0].ids
    for one in coded[1:]:
        same = zip(first[:least], one.ids[:least], strict=True)
        least = next((n for n, (a, b) in enumerate(same) if a != b), least)
    return least
