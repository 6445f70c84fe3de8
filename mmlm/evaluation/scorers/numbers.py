"""Answers that are numbers: counts (TallyQA), and the mixed answers of MathVista."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mmlm.evaluation.scorers.base import Mark, ScorerConfig, Target, scorers
from mmlm.evaluation.scorers.choice import LETTERS, read_choice
from mmlm.evaluation.scorers.reading import levenshtein

_TEENS = ("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen",
          "eighteen", "nineteen", "twenty")  # fmt: skip
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_WORDS = {word: number for number, word in enumerate((*_DIGITS, *_TEENS))} | {"no": 0, "none": 0}
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
_SAID = re.compile(r"answer(?: is|:)?\s*(.+)", re.IGNORECASE | re.DOTALL)


def read_count(answer: str) -> int | None:
    """The one whole number that an answer says, in digits or words up to twenty, or None.

    >>> [read_count(text) for text in ("3", "Three dogs.", "There are 12 of them", "none", "1,000")]
    [3, 3, 12, 0, 1000]
    >>> [read_count(text) for text in ("2 or 3", "many", "", "2.5")]
    [None, None, None, None]
    """
    words = re.findall(r"[a-z]+", answer.lower())
    said = {number_of(text) for text in _NUMBER.findall(answer)}
    said |= {float(_WORDS[word]) for word in words if word in _WORDS}
    if len(said) != 1:
        return None
    number = said.pop()
    return int(number) if number == int(number) else None


def number_of(text: str) -> float:
    """Read a number with or without thousands separators.

    >>> number_of("1,234.5")
    1234.5
    """
    return float(text.replace(",", ""))


@scorers.register("count")
class CountConfig(ScorerConfig):
    """The answer is the number, in digits or words (TallyQA and other counting)."""

    def mark(self, answer: str, target: Target) -> Mark:
        """Mark one answer."""
        said = read_count(answer)
        return Mark(
            float(said is not None and said == read_count(target.references[0])),
            None if said is None else str(said),
        )

    def fault(self, target: Target) -> str | None:
        """Refuse a row whose answer is no whole number."""
        if not target.references or read_count(target.references[0]) is None:
            return f"its answer must be a whole number (got {', '.join(target.references)!r:.60})"
        return None


def normalise_mathvista(
    extracted: str, choices: Sequence[str], *, answer_type: str = "text", precision: int = 0
) -> str | None:
    """Bring an extracted answer to the form of MathVista's references, as its script does.

    A choice is its text: by ``(X)`` or a capital alone, else the option nearest in letters.
    An integer is cut, a float rounded. An empty answer has no form here; the script would take
    the first option.

    >>> options = ["29", "12", "37", "38"]
    >>> [normalise_mathvista(text, options) for text in ("(D)", "d", "thirty eight", "")]
    ['38', '29', '29', None]
    >>> normalise_mathvista("14.9", (), answer_type="integer")
    '14'
    >>> normalise_mathvista("1.4", (), answer_type="float", precision=2)
    '1.4'
    >>> normalise_mathvista("60%", (), answer_type="integer") is None
    True
    """
    extracted = extracted.strip()
    if not extracted:
        return None
    if choices:
        found = re.search(r"\(([a-zA-Z])\)", extracted)
        letter = found[1].upper() if found else extracted
        if letter in LETTERS[: len(choices)] and len(letter) == 1:
            return choices[LETTERS.index(letter)]
        return _nearest(extracted, choices)
    try:
        if answer_type == "integer":
            return str(int(float(extracted)))
        if answer_type == "float":
            return str(round(float(extracted), precision))
    except (ValueError, OverflowError):
        return None
    return extracted


def _nearest(text: str, choices: Sequence[str]) -> str:
    return min(choices, key=lambda choice: levenshtein(text, choice))


def extract_mathvista(answer: str, choices: Sequence[str], *, answer_type: str) -> str | None:
    """Take the answer out of a sentence by rule; the paper has a language model do it.

    >>> extract_mathvista("The answer is 14.", (), answer_type="integer")
    '14'
    >>> extract_mathvista("So it is (B).", ["cat", "dog"], answer_type="text")
    'dog'
    >>> extract_mathvista("I see nothing", (), answer_type="float") is None
    True
    """
    if choices:
        number = read_choice(answer, choices)
        return None if number is None else choices[number]
    said = _SAID.search(answer)
    text = said[1] if said else answer
    if answer_type in ("integer", "float"):
        numbers = _NUMBER.findall(text) or _NUMBER.findall(answer)
        return str(numbers[0 if said else -1]).replace(",", "") if numbers else None
    return text.strip().strip(".") or None


@scorers.register("mathvista")
class MathVistaConfig(ScorerConfig):
    """MathVista without a judge: the answer is taken out by rule, then compared as text.

    `official` compares what stands there, with the script's own normalisation, as if the judge
    had passed the answer on unchanged. `mmlm` first takes the answer out of a sentence. The
    paper's numbers have a language model in that place and are not comparable with either.
    """

    dialects = ("mmlm", "official")
    fact_columns = ("answer_type", "precision")

    def mark(self, answer: str, target: Target) -> Mark:
        """Mark one answer."""
        kind = str(target.facts.get("answer_type") or "text")
        precision = int(float(target.facts.get("precision") or 0))
        taken: str | None = answer
        if self.spoken == "mmlm":
            taken = extract_mathvista(answer, target.choices, answer_type=kind)
        if taken is None or (said := normalise_mathvista(
            taken, target.choices, answer_type=kind, precision=precision
        )) is None:  # fmt: skip
            return Mark(0.0, None)
        truth = target.references[0]
        right = said == truth
        if self.spoken == "mmlm" and not target.choices and kind in ("integer", "float"):
            # The script compares texts: 1.4 is not 1.40 there.
            right = float(said) == round(float(truth), precision)
        return Mark(float(right), said)

    def fault(self, target: Target) -> str | None:
        """Refuse a row whose number is none."""
        kind = target.facts.get("answer_type")
        if target.references and kind in ("integer", "float") and not target.choices:
            try:
                float(target.references[0])
            except ValueError:
                return f"its answer must be a number (got {target.references[0]!r:.60})"
        return super().fault(target)
