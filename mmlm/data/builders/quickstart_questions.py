"""The quickstart's questions, asked so that words alone do not give the answer away.

Every question with options is balanced: among the questions of one kind, an option stands as
a wrong answer exactly three times as often as it is the right one, and the right one stands
equally often in each place. Somebody who has read every question, and sees no picture, is at
chance. Nothing here opens a picture.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from mmlm.errors import DataError

NUM_WRONG = 3
_ROUNDS = 300
_ROOM = 0.9

STEMS: dict[str, str] = {
    "name": "Which is it",
    "group": "What kind of thing is it",
    "use": "Which word goes with it",
    "colour": "What is its main colour",
}
"""How each kind of question with options begins."""

FREE: dict[str, str] = {
    "name": "What is this?",
    "group": "What kind of thing is this?",
    "photo": "What is in this photo?",
}
"""Questions without options."""


@dataclass(frozen=True)
class Ask:
    """One question that is to get options.

    Args:
        answer: The right answer.
        taboo: Answers that would be right too, or nearly; they are never options.
        bucket: Wrong answers come from questions of the same bucket.
    """

    answer: str
    taboo: frozenset[str]
    bucket: Hashable = ""


def balanced_options(asks: Sequence[Ask], rng: random.Random) -> list[tuple[str, ...] | None]:
    """Return the options of each question, the right one among them.

    In each bucket, the wrong options are the answers themselves, each `NUM_WRONG` times, dealt
    anew until no question holds one twice or a taboo one. Questions for which that cannot be
    done get None, and their answers are no options elsewhere.
    """
    options: list[tuple[str, ...] | None] = [None] * len(asks)
    buckets: dict[Hashable, list[int]] = {}
    for number, ask in enumerate(asks):
        buckets.setdefault(ask.bucket, []).append(number)
    for numbers in buckets.values():
        for number, wrong in _deal(asks, numbers, rng).items():
            options[number] = (asks[number].answer, *wrong)
    places = [place % (NUM_WRONG + 1) for place in range(len(asks))]
    rng.shuffle(places)
    for number, place in enumerate(places):
        found = options[number]
        if found is not None:
            wrong = list(found[1:])
            options[number] = (*wrong[:place], found[0], *wrong[place:])
    return options


def _deal(
    asks: Sequence[Ask], numbers: Sequence[int], rng: random.Random
) -> dict[int, tuple[str, ...]]:
    """Deal the wrong answers of one bucket; leave out as few questions as make it possible."""
    left = _thinned(asks, numbers, rng)
    while len(left) > NUM_WRONG:
        hands, stuck = _deal_once(asks, left, rng)
        if not stuck:
            return {number: tuple(hand) for number, hand in hands.items()}
        # An answer that has no room goes, not the question that could not take it.
        homeless = sorted(stuck)
        for answer in homeless[: max(1, len(homeless) // 2)]:
            left.remove(rng.choice([number for number in left if asks[number].answer == answer]))
    return {}


def _thinned(asks: Sequence[Ask], numbers: Sequence[int], rng: random.Random) -> list[int]:
    """Leave out questions of answers that are too common to be a wrong option often enough."""
    left = list(numbers)
    while True:
        given = Counter(asks[number].answer for number in left)
        barred = Counter(answer for number in left for answer in asks[number].taboo)
        crowded = [
            answer
            for answer, count in sorted(given.items())
            if NUM_WRONG * count > _ROOM * (len(left) - barred[answer])
        ]
        if not crowded:
            return left
        for answer in crowded:
            left.remove(rng.choice([number for number in left if asks[number].answer == answer]))


def _deal_once(
    asks: Sequence[Ask], left: Sequence[int], rng: random.Random
) -> tuple[dict[int, list[str]], set[str]]:
    """Deal, and swap cards between hands until every hand is fair.

    Returns:
        The hands, and the answers that are still in a hand where they may not be.
    """
    slots = [(number, card) for number in left for card in range(NUM_WRONG)]
    cards = [asks[number].answer for number, _ in slots]
    rng.shuffle(cards)
    hands = {number: [""] * NUM_WRONG for number in left}
    for (number, card), value in zip(slots, cards, strict=True):
        hands[number][card] = value

    def fair(number: int, card: int, value: str) -> bool:
        hand = hands[number]
        return value not in asks[number].taboo and all(
            hand[other] != value for other in range(NUM_WRONG) if other != card
        )

    stuck = [slot for slot in slots if not fair(*slot, hands[slot[0]][slot[1]])]
    for _ in range(_ROUNDS):
        for number, card in stuck:
            other, place = rng.choice(slots)
            mine, theirs = hands[number][card], hands[other][place]
            if other != number and fair(other, place, mine) and fair(number, card, theirs):
                hands[number][card], hands[other][place] = theirs, mine
        # A swap into a fair place leaves that place fair: only these can still be wrong.
        stuck = [slot for slot in stuck if not fair(*slot, hands[slot[0]][slot[1]])]
        if not stuck:
            break
    return hands, {hands[number][card] for number, card in stuck}


def choice_text(stem: str, options: Sequence[str]) -> str:
    """Return a question with its options, as a person would say it.

    >>> choice_text("Which is it", ["cat", "dog", "fox"])
    'Which is it: cat, dog or fox?'
    """
    return f"{stem}: {', '.join(options[:-1])} or {options[-1]}?"


def ask_all(
    kind: str,
    rows: Sequence[dict[str, Any]],
    make: Callable[[dict[str, Any]], Ask | None],
    rng: random.Random,
) -> list[dict[str, Any]]:
    """Return the rows for which a question of a kind can be asked, with question and options.

    Raises:
        DataError: if none can.
    """
    asked = [(row, ask) for row in rows if (ask := make(row)) is not None]
    options = balanced_options([ask for _, ask in asked], rng)
    done = [
        {
            **row,
            "kind": kind,
            "question": choice_text(STEMS[kind], found),
            "answer": ask.answer,
            "answers": [ask.answer],
            "choices": list(found),
        }
        for (row, ask), found in zip(asked, options, strict=True)
        if found is not None
    ]
    if not done:
        raise DataError(f"No question of the kind {kind!r} could be asked of {len(rows)} pictures.")
    return done
