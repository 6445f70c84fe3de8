"""A letter, where the options stand inside the question (MMStar, V*, BLINK).

The row does not hold the options apart, so only the letter can be read; an option said by its
text counts as unreadable. Where options are a column, take `choice`.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from mmlm.evaluation.scorers.base import Mark, ScorerConfig, Target, scorers

_ALONE = re.compile(r"^\W*([A-Za-z])\W*$")
_LEADING = re.compile(r"^\W*([A-Z])\s?(?:[.):]|\*\*)")
_SAID = re.compile(r"(?:[Aa]nswer|[Oo]ption|[Cc]hoice)(?: is|:)?\W{0,3}\(?\*{0,2}([A-Z])\b(?!')")
_BRACKETED = re.compile(r"[(\[]([A-Z])[)\]]")


def read_letter(answer: str, *, dialect: str = "mmlm") -> str | None:
    """The letter that an answer picks, or None.

    `mmlm`: alone, in front (``B. a bus``), after "the answer is", or the only one in brackets.
    `llava`: the answer is the letter, and nothing else.

    >>> [read_letter(text) for text in ("B", "(b)", "B. a bus", "The answer is **C**.", "So (D).")]
    ['B', 'B', 'B', 'C', 'D']
    >>> [read_letter(text) for text in ("", "a bus", "(A) or (B)", "A bus")]
    [None, None, None, None]
    >>> [read_letter(text, dialect="llava") for text in ("B", "B.", "b")]
    ['B', None, None]
    """
    return _READERS[dialect](answer)


def _plain(answer: str) -> str | None:
    answer = answer.strip()
    if found := _ALONE.match(answer):
        return found[1].upper()
    bracketed = set(_BRACKETED.findall(answer))
    patterns = (_LEADING, _SAID) if len(bracketed) < 2 else (_SAID,)
    for pattern in patterns:
        if found := pattern.search(answer):
            return found[1]
    return bracketed.pop() if len(bracketed) == 1 else None


def _whole(answer: str) -> str | None:
    return answer if len(answer) == 1 and "A" <= answer <= "Z" else None


_READERS: dict[str, Callable[[str], str | None]] = {
    "mmlm": _plain,
    "llava": _whole,
}


@scorers.register("letter")
class LetterOnlyConfig(ScorerConfig):
    """The answer picks the right letter; the options stand in the question."""

    dialects = ("mmlm", "llava")

    num_choices: int = 0
    """How many options every question has, for the score of guessing; 0 where it differs."""

    def mark(self, answer: str, target: Target) -> Mark:
        """Mark one answer."""
        said = read_letter(answer, dialect=self.spoken)
        return Mark(float(said is not None and said == _truth(target)), said)

    def chance(self, target: Target) -> float | None:
        """One in as many as there are options, where the config says how many."""
        return 1 / self.num_choices if self.num_choices else super().chance(target)

    def fault(self, target: Target) -> str | None:
        """Refuse a row whose answer is no letter."""
        if _truth(target) is None:
            return f"its answer must be a letter, such as B or (B) (got {target.references!r:.60})"
        return None


def _truth(target: Target) -> str | None:
    if not target.references:
        return None
    letter = target.references[0].strip().strip("().").upper()
    return letter if len(letter) == 1 and letter.isalpha() else None
