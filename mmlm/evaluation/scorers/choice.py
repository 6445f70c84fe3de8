"""One of several options, said by letter or by text.

`choice` is our own reading. The others read as the published script of a benchmark does,
quirks included, except for one: where a script falls back to a random option, the answer
is wrong here and counts as unreadable.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from mmlm.evaluation.scorers.base import Mark, ScorerConfig, Target, scorers
from mmlm.evaluation.scorers.names import names_in
from mmlm.evaluation.scorers.text import plain

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_ALONE = re.compile(r"^\W*([A-Za-z])\W*$")
_LEADING = re.compile(r"^\W*([A-Z])\s?(?:[.):]|\*\*)\s*\S")
_SAID = re.compile(r"(?:[Aa]nswer|[Oo]ption|[Cc]hoice)(?: is|:)?\W{0,3}\(?\*{0,2}([A-Z])\b(?!')")
_BRACKETED = re.compile(r"[(\[]([A-Z])[)\]]")


def read_choice(answer: str, choices: Sequence[str]) -> int | None:
    """The option that an answer picks, by number, or None if it picks none or several.

    An option's text comes first, because an option may itself be a letter; then a letter
    alone, a letter that leads (``B. a bus``), ``the answer is B``, a single ``(B)``; last,
    exactly one option named in the text.

    >>> options = ["a red car", "a bus", "a dog", "an ant"]
    >>> [read_choice(text, options) for text in ("B", "b.", "(B)", "**B**", "B. a bus", "A bus.")]
    [1, 1, 1, 1, 1, 1]
    >>> read_choice("The correct answer is **C**. A is wrong.", options)
    2
    >>> read_choice("I think it is the dog", options), read_choice("a car", ["car", "red car"])
    (2, 0)
    >>> [read_choice(text, options) for text in ("a dog and an ant", "", "E")]
    [None, None, None]
    """
    texts = [plain(choice) for choice in choices]
    said = plain(answer)
    if said and texts.count(said) == 1:
        return texts.index(said)
    if letter := _ALONE.match(answer):
        return _number(letter[1].upper(), choices)
    for pattern in (_LEADING, _SAID):
        if letter := pattern.search(answer.strip()):
            return _number(letter[1], choices)
    bracketed = set(_BRACKETED.findall(answer))
    if len(bracketed) == 1:
        return _number(bracketed.pop(), choices)
    named = names_in(answer, choices)
    return choices.index(named[0]) if len(named) == 1 else None


def _number(letter: str, choices: Sequence[str]) -> int | None:
    number = LETTERS.index(letter)
    return number if number < len(choices) else None


def truth_number(target: Target) -> int | None:
    """Which option the reference means: by text, else by letter.

    >>> [truth_number(Target((text,), ("a cat", "a dog"))) for text in ("a dog", "B", "a bus")]
    [1, 1, None]
    """
    for reference in target.references:
        for same in (lambda a, b: a == b, lambda a, b: plain(a) == plain(b)):
            hits = [n for n, choice in enumerate(target.choices) if same(choice, reference)]
            if len(hits) == 1:
                return hits[0]
        if len(reference) == 1 and reference.upper() in LETTERS:
            return _number(reference.upper(), target.choices)
    return None


class LetterScorer(ScorerConfig):
    """Base of the scorers that read an option: right if it is the one that the reference means."""

    def read(self, answer: str, choices: Sequence[str]) -> int | None:
        """Return the number of the option that the answer picks, or None."""
        raise NotImplementedError

    def mark(self, answer: str, target: Target) -> Mark:
        """Mark one answer; the reading is the text of the option."""
        number = self.read(answer, target.choices)
        if number is None:
            return Mark(0.0, None)
        return Mark(float(number == truth_number(target)), target.choices[number])

    def fault(self, target: Target) -> str | None:
        """Refuse rows without options, or whose answer is none of them."""
        if len(target.choices) < 2:
            return f"it has {len(target.choices)} choices; a choice needs at least two"
        texts = [plain(choice) or choice for choice in target.choices]
        if len(set(texts)) < len(texts):
            return f"two of its choices are the same ({', '.join(target.choices)})"
        if truth_number(target) is None:
            return (
                f"its answer {', '.join(target.references)!r} is none of its choices "
                f"({', '.join(target.choices)})"
            )
        return None


@scorers.register("choice")
class ChoiceConfig(LetterScorer):
    """The answer picks the right option, by letter or by text."""

    def read(self, answer: str, choices: Sequence[str]) -> int | None:
        """Return the number of the option that the answer picks, or None."""
        return read_choice(answer, choices)
