"""Free answers: exactly, by name, or by keyword."""

from __future__ import annotations

import string
from collections.abc import Sequence

from mmlm.evaluation.scorers.base import Mark, ScorerConfig, Target, scorers
from mmlm.evaluation.scorers.text import find, joined_stems, plain, stems_of, windows


def exact(answer: str, references: Sequence[str], *, dialect: str = "mmlm") -> float:
    """1 if the answer equals a reference.

    `mmlm` forgives case, articles, punctuation and spaces; `raw` forgives nothing (GQA's own
    script); `llava` forgives case and final periods (LLaVA on GQA); `lmms-eval` deletes all
    ASCII punctuation and forgives case.

    >>> exact("A red panda.", ["red panda"]), exact("panda", ["red panda"])
    (1.0, 0.0)
    >>> [exact("Yes.", ["yes"], dialect=name) for name in ("raw", "llava", "lmms-eval")]
    [0.0, 1.0, 1.0]
    >>> [exact("tshirt", ["t-shirt"], dialect=name) for name in ("raw", "llava", "lmms-eval")]
    [0.0, 0.0, 1.0]
    """
    change = _EXACT[dialect]
    wanted = {change(reference) for reference in references}
    return float(bool(answer.strip()) and change(answer) in wanted)


def _without_punctuation(text: str) -> str:
    return text.lower().translate(str.maketrans("", "", string.punctuation))


_EXACT = {
    "mmlm": plain,
    "raw": str,
    "llava": lambda text: text.rstrip(".").lower(),
    "lmms-eval": _without_punctuation,
}


def keyword(answer: str, references: Sequence[str]) -> str | None:
    """The reference that stands in the answer, as whole words in singular or plural.

    >>> keyword("There are two big dogs on the grass.", ["dog", "puppy"])
    'dog'
    >>> keyword("This belongs to the category of cats", ["cat"])
    'cat'
    >>> keyword("a category", ["cat"]) is None
    True
    """
    stems = stems_of(answer)
    found = [name for name in references if find(stems, stems_of(name))]
    return max(found, key=len) if found else None


def names_in(answer: str, vocabulary: Sequence[str]) -> list[str]:
    """The names of a vocabulary that an answer says, in order; longer names hide their parts.

    >>> names_in("A red panda next to a dog", ["panda", "red panda", "dog", "cat"])
    ['red panda', 'dog']
    """
    stems = stems_of(answer)
    known: dict[str, str] = {}
    for name in vocabulary:
        known.setdefault(joined_stems(name), name)
    places = [(end - start, start, known[joined]) for start, end, joined in windows(stems, known)]
    taken: set[int] = set()
    kept: list[tuple[int, str]] = []
    for width, start, name in sorted(places, key=lambda place: (-place[0], place[1])):
        inside = set(range(start, start + width))
        if not inside & taken:
            taken |= inside
            kept.append((start, name))
    return list(dict.fromkeys(name for _, name in sorted(kept)))


def name(answer: str, references: Sequence[str], vocabulary: Sequence[str] = ()) -> Mark:
    """1 if the answer names the thing and nothing else that could have been asked for.

    >>> name("A photo of a red panda.", ["red panda"], ["red panda", "panda", "dog"])
    Mark(score=1.0, reading='red panda')
    >>> name("A panda.", ["red panda"], ["red panda", "panda", "dog"])
    Mark(score=0.0, reading='panda')
    >>> name("A dog or a red panda", ["red panda"], ["red panda", "panda", "dog"])
    Mark(score=0.0, reading='dog, red panda')
    >>> name("Something nice", ["red panda"])
    Mark(score=0.0, reading=None)
    """
    said = names_in(answer, [*references, *vocabulary])
    accepted = {plain(reference) for reference in references}
    right = bool(said) and all(plain(each) in accepted for each in said)
    return Mark(float(right), ", ".join(said) or None)


@scorers.register("exact")
class ExactConfig(ScorerConfig):
    """The answer is one of the references, and nothing else."""

    dialects = ("mmlm", "raw", "llava", "lmms-eval")

    def mark(self, answer: str, target: Target) -> Mark:
        """Mark one answer."""
        return Mark(exact(answer, target.references, dialect=self.spoken), answer.strip() or None)


@scorers.register("keyword")
class KeywordConfig(ScorerConfig):
    """A reference stands somewhere in the answer, as whole words.

    Other words do not count against the answer, so this is right for descriptions and too
    kind for naming: there, take `name`.
    """

    def mark(self, answer: str, target: Target) -> Mark:
        """Mark one answer."""
        found = keyword(answer, target.references)
        return Mark(float(found is not None), found or answer.strip() or None)


@scorers.register("name")
class NameConfig(ScorerConfig):
    """The answer names the thing, and no other thing of the benchmark."""

    def mark(self, answer: str, target: Target) -> Mark:
        """Mark one answer."""
        return name(answer, target.references, target.vocabulary)
