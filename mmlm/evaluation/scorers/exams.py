"""Options as the published scripts read them: MMBench, ScienceQA, SEED-Bench, AI2D, MMMU.

Their quirks are kept, for numbers that can be compared; where a script draws a random
option because it could read none, the answer is wrong here. `choice` is the reading to take
where no comparison is meant.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

import numpy as np

from mmlm.evaluation.scorers.base import Mark, Row, Target, scorers
from mmlm.evaluation.scorers.choice import LETTERS, LetterScorer
from mmlm.evaluation.scorers.mmmu_open import mmmu_open_right, read_mmmu_open
from mmlm.evaluation.statistics import Floats

_REFUSALS = ("sorry, i can't help", "i can't process this file", "i'm sorry, but without",
             "cannot determine the answer")  # fmt: skip


def _index(letter: str, choices: Sequence[str]) -> int | None:
    number = LETTERS.find(letter)
    return number if 0 <= number < len(choices) else None


def read_mmbench(answer: str, choices: Sequence[str], *, dialect: str = "vlmevalkit") -> int | None:
    """MMBench: exactly one letter as a word near the end, else exactly one option's text.

    >>> options = ["a dog", "a blue bus", "a car", "a tree"]
    >>> [read_mmbench(text, options) for text in ("B", "(B)", "b", "A blue bus", "A dog")]
    [1, 1, None, 0, 0]
    >>> [read_mmbench("**B**", options, dialect=name) for name in ("vlmevalkit", "lmms-eval")]
    [1, None]
    >>> read_mmbench("I think B is right because A is wrong", options) is None
    True
    >>> read_mmbench("The correct answer is **B**. A is wrong.", options)
    1
    """
    if dialect == "lmms-eval":
        return _mmbench_lmms_eval(answer, choices)
    letters = LETTERS[: len(choices)]
    if any(refusal in answer.lower() for refusal in _REFUSALS):
        return None
    words = _split(answer, ".()[],:;!*#{}")
    said = [letter for letter in letters if letter in words]
    if len(said) == 1 and words.index(said[0]) >= len(words) - 4:
        return letters.index(said[0])
    # One letter that is an article: "A blue bus".
    if len(said) == 1 and said[0] != "A":
        return None
    found = re.search(r"(?:correct )?answer is \*\*([A-Z])\*\*", answer)
    if found is not None:
        return _index(found[1], choices)
    lower = answer.lower()
    if len(lower) > 2 * sum(len(choice) for choice in choices):
        return None
    held = [number for number, choice in enumerate(choices) if choice.lower() in lower]
    return held[0] if len(held) == 1 else None


# What may stand around a letter in a word of its own, in the order in which it is looked for.
_AROUND = (("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ")."),
           (":", ""), (":", ","), (":", "."), (":", ")"), (":", ")."))  # fmt: skip


def _mmbench_lmms_eval(answer: str, choices: Sequence[str]) -> int | None:
    """A letter as a word, alone or with marks; else exactly one option's text, however long."""
    words = answer.split()
    for before, after in (("", ""), *_AROUND):
        said = [letter for letter in LETTERS[:5] if before + letter + after in words]
        # With more than three words, a bare A may be an article, and no bare letter counts.
        article = not before and not after and "A" in words and len(words) > 3
        if len(said) == 1 and not article:
            return _index(said[0], choices)
    held = [n for n, choice in enumerate(choices) if choice.lower() in answer.lower()]
    return held[0] if len(held) == 1 else None


def _split(text: str, marks: str) -> list[str]:
    return text.translate(str.maketrans(marks, " " * len(marks))).split()


def read_scienceqa(answer: str, choices: Sequence[str], *, dialect: str = "llava") -> int | None:
    """ScienceQA: the letter alone, ``B. …``, or ``The answer is B.`` with its period.

    >>> options = ["cat", "dog"]
    >>> texts = ("B", "b", "B.", "B. dog", "The answer is B.", "The answer is B", "B) dog")
    >>> [read_scienceqa(text, options) for text in texts]
    [1, None, None, 1, 1, None, None]
    >>> [read_scienceqa(text, options, dialect="lmms-eval") for text in texts]
    [1, 1, 1, 1, None, None, None]
    """
    if dialect == "lmms-eval":
        said = answer.strip()
        if len(said) == 1:
            return _index(said.upper(), choices)
        return _index(said[0], choices) if re.match(r"^[A-Z]\.", said) else None
    if answer in LETTERS[:5] and len(answer) == 1:
        return _index(answer, choices)
    if len(answer) >= 3 and answer[0] in LETTERS and answer[1:3] == ". ":
        return _index(answer[0], choices)
    found = re.findall(r"The answer is ([A-Z]).", answer)
    return _index(found[0], choices) if len(found) == 1 else None


def read_seed(answer: str, choices: Sequence[str], *, dialect: str = "llava") -> int | None:
    """SEED-Bench: the letter and nothing else; lmms-eval takes the first character.

    >>> options = ["w", "x", "y", "z"]
    >>> [read_seed(text, options) for text in ("B", "B.", "b", "Because...")]
    [1, None, None, None]
    >>> [read_seed(text, options, dialect="lmms-eval") for text in ("B", "B.", "b", "Because...")]
    [1, 1, None, 1]
    """
    letter = answer.strip()[:1] if dialect == "lmms-eval" else answer
    return _index(letter, choices) if len(letter) == 1 else None


def read_ai2d(answer: str, choices: Sequence[str]) -> int | None:
    """AI2D in lmms-eval: ``B.`` first, else the whole text without case and punctuation.

    >>> options = ["root", "leaf"]
    >>> texts = ("B", "B. leaf", "(B)", " B", "The answer is B.", "B) leaf")
    >>> [read_ai2d(text, options) for text in texts]
    [1, 1, 1, None, None, None]
    """
    found = re.match(r"^\s*([A-Z])\.", answer)
    said = found[1] if found else answer
    said = said.lower().translate(str.maketrans("", "", string.punctuation))
    return _index(said.upper(), choices) if len(said) == 1 else None


def read_mmmu(answer: str, choices: Sequence[str], *, dialect: str = "official") -> int | None:
    """MMMU: ``(X)``, else the letter as a word, else an option's text; the last one wins.

    >>> options = ["7/11", "8/11", "9/11", "10/11"]
    >>> [read_mmmu(text, options) for text in ("(B)", "B.", "A or (C)? I think (D)")]
    [1, 1, 3]
    >>> [read_mmmu(text, options) for text in ("8/11", "b", "**B**", "B) 8/11")]
    [None, None, None, None]
    """
    letters = LETTERS[: len(choices)]
    for mark in ",.!?;:'":
        answer = answer.strip(mark)
    text = f" {answer} "
    patterns = ("({})", "{} ", "{}.") if dialect == "lmms-eval" else ("({})", " {} ")
    for pattern in patterns:
        said = [letter for letter in letters if pattern.format(letter) in text]
        if said:
            # The last one wins; without brackets, only places as a word of its own count.
            place = pattern if pattern == "({})" else " {} "
            return letters.index(max(said, key=lambda letter: text.rfind(place.format(letter))))
    if len(text.split()) <= 5:
        return None
    lower = text.lower()
    held = {n: lower.rfind(choice.lower()) for n, choice in enumerate(choices)}
    held = {number: place for number, place in held.items() if place >= 0}
    return max(held, key=held.__getitem__) if held else None


@scorers.register("mmbench")
class MMBenchConfig(LetterScorer):
    """MMBench: a question counts only if it is right in every order of its options.

    Rows of one question have the same id modulo a million, as in the published tables; the
    score is over questions.
    """

    version = 2
    metric = "circular accuracy"
    is_share = False
    dialects = ("vlmevalkit", "lmms-eval")

    def read(self, answer: str, choices: Sequence[str]) -> int | None:
        """Return the number of the option that the answer picks, or None."""
        return read_mmbench(answer, choices, dialect=self.spoken)

    def tallies(self, rows: Sequence[Row]) -> Floats:
        """Put a question's outcome on its first row."""
        table = np.zeros((len(rows), 2))
        for members in _questions(rows).values():
            table[members[0]] = float(all(rows[n].mark.score == 1.0 for n in members)), 1.0
        return table

    def also(self, rows: Sequence[Row]) -> dict[str, float]:
        """The share of single rows that are right."""
        return {"accuracy_of_rows": float(np.mean([row.mark.score for row in rows]))}


def _questions(rows: Sequence[Row]) -> dict[str, list[int]]:
    questions: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        name = str(int(row.id) % 1_000_000) if row.id.isdigit() else row.id
        questions.setdefault(name, []).append(number)
    return questions


@scorers.register("scienceqa")
class ScienceQAConfig(LetterScorer):
    """ScienceQA's letter."""

    dialects = ("llava", "lmms-eval")

    def read(self, answer: str, choices: Sequence[str]) -> int | None:
        """Return the number of the option that the answer picks, or None."""
        return read_scienceqa(answer, choices, dialect=self.spoken)


@scorers.register("seed")
class SeedConfig(LetterScorer):
    """SEED-Bench's letter; its own script ranks by likelihood (`decide: likelihood`)."""

    dialects = ("llava", "lmms-eval")

    def read(self, answer: str, choices: Sequence[str]) -> int | None:
        """Return the number of the option that the answer picks, or None."""
        return read_seed(answer, choices, dialect=self.spoken)


@scorers.register("ai2d")
class AI2DConfig(LetterScorer):
    """AI2D's letter, as lmms-eval reads it."""

    dialects = ("lmms-eval",)

    def read(self, answer: str, choices: Sequence[str]) -> int | None:
        """Return the number of the option that the answer picks, or None."""
        return read_ai2d(answer, choices)


@scorers.register("mmmu")
class MMMUConfig(LetterScorer):
    """MMMU: the letter where there are options, else the open answer; all questions count alike."""

    version = 2
    dialects = ("official", "lmms-eval")

    def read(self, answer: str, choices: Sequence[str]) -> int | None:
        """Return the number of the option that the answer picks, or None."""
        return read_mmmu(answer, choices, dialect=self.spoken)

    def mark(self, answer: str, target: Target) -> Mark:
        """Mark one answer."""
        if target.choices:
            return super().mark(answer, target)
        said = read_mmmu_open(answer)
        right = mmmu_open_right(said, target.references)
        return Mark(float(right), ", ".join(map(str, said)) or None)

    def fault(self, target: Target) -> str | None:
        """Refuse rows whose answer is none of their options; an open row needs an answer."""
        if target.choices:
            return super().fault(target)
        return None if target.references else "it has no reference answer"
