"""AMBER's descriptions: which of the things that are there are named, and which that are not?

Wang et al. 2023, arXiv 2311.07397. The benchmark brings, for each picture, the things that are
there and those that a model is likely to imagine, and two files: `relation.json`, which words
may stand for a thing, and `safe_words.txt`, words that never count against a description.

Its script tags nouns with NLTK's data, and takes two words for one where the vectors of spaCy's
`en_core_web_lg` are alike; no package index has either. Here a word counts if it, or its
singular, is in `relation.json`; `vectors` names a spaCy model for the second rule. Numbers are
therefore near the paper's and not equal to them, and the label says which way they were had.
A smaller model is no substitute: `en_core_web_md` keeps 20,000 vectors for 684,830 words, so that
a cat is a dog. Such a model is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from mmlm.errors import ConfigError, MissingExtraError
from mmlm.evaluation.scorers.base import Mark, Row, ScorerConfig, Target, scorers
from mmlm.evaluation.scorers.chair import singular
from mmlm.evaluation.statistics import Floats

Alike = Callable[[str, str], bool]
"""Whether two different words mean the same."""

_WORD = re.compile(r"[a-z]+(?:-[a-z]+)*")
_ALIKE_ABOVE = 0.8
_TOLD_APART = ("cat", "dog")
"""Two words that a model with all its vectors tells apart."""

_WANTED = (
    "scorer: `relation` and `safe_words` must name relation.json and safe_words.txt of AMBER's "
    "`data/`"
)
_NOT_THERE = " (not there)"
_NOTHING = "no thing"


class Words(NamedTuple):
    """The words of AMBER: what may stand for a thing, and what never counts against one."""

    related: Mapping[str, tuple[str, ...]]
    safe: frozenset[str]
    known: frozenset[str]


class Counts(NamedTuple):
    """What one description mentions."""

    wrong: int
    """Mentions of things that are not there."""
    mentions: int
    covered: int
    """Things that are there and are mentioned."""
    there: int
    imagined: int
    """Things that a model is likely to imagine, and that are mentioned."""
    likely: int


@cache
def read_words(relation: str, safe_words: str) -> Words:
    """Read the two files.

    Raises:
        ConfigError: if one of them cannot be read, or is another file.
    """
    try:
        table: Any = json.loads(Path(relation).read_text(encoding="utf-8"))
        lines = Path(safe_words).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{_WANTED}; they cannot be read: {error}.") from None
    if not isinstance(table, dict) or not table:
        raise ConfigError(f"{_WANTED}; {relation} holds no words with their relations.")
    related: dict[str, tuple[str, ...]] = {}
    for word, others in cast(dict[str, Any], table).items():
        if not isinstance(others, list) or not all(
            isinstance(other, str) for other in cast(list[Any], others)
        ):
            raise ConfigError(
                f"{_WANTED}; in {relation}, {word!r} must have a list of words "
                f"(got {others!r:.60})."
            )
        related[word] = tuple(cast(list[str], others))
    known = frozenset(related).union(*related.values())
    return Words(related, frozenset(line.strip() for line in lines), known)


def words_in(text: str, known: frozenset[str]) -> list[str]:
    """Return the known words of a text, in order, as often as they stand there.

    >>> words_in("Two dogs on the grass, a dog.", frozenset({"dog", "grass"}))
    ['dog', 'grass', 'dog']
    """
    found = _WORD.findall(text.lower())
    forms = [word if word in known else singular(word) for word in found]
    return [form for form in forms if form in known]


def count_mentions(
    nouns: Sequence[str],
    there: Sequence[str],
    likely: Sequence[str],
    words: Words,
    alike: Alike | None = None,
) -> Counts:
    """Count as AMBER's script does.

    Args:
        nouns: The known words of a description.
        there: The things in the picture.
        likely: Things that are not there and are easily imagined.
        words: The words of AMBER.
        alike: Whether two words mean the same; without it, equal ones alone do.

    >>> words = Words({"dog": ("puppy",), "cat": ()}, frozenset({"photo"}), frozenset())
    >>> count_mentions(["puppy", "cat", "photo"], ["dog"], ["cat"], words)
    Counts(wrong=1, mentions=3, covered=1, there=1, imagined=1, likely=1)
    """
    true, false = _names(there, words), _names(likely, words)
    covered: set[int | None] = set()
    imagined: set[int | None] = set()
    wrong = 0
    for noun in nouns:
        if noun in words.safe:
            continue
        place = _first(true, noun, None)
        if place is not None:
            covered.add(place)
            continue
        # The script asks for an equal word, and then once more for one that is alike.
        imagined |= {_first(false, noun, None), _first(false, noun, alike)} - {None}
        place = _first(true, noun, alike)
        covered |= {place} - {None}
        wrong += place is None
    return Counts(wrong, len(nouns), len(covered), len(there), len(imagined), len(likely))


def _names(things: Sequence[str], words: Words) -> list[tuple[str, int]]:
    """Return every word for each thing, with the thing's number: related words before its own."""
    related = [(word, n) for n, thing in enumerate(things) for word in words.related.get(thing, ())]
    return related + [(thing, n) for n, thing in enumerate(things)]


def _first(names: Sequence[tuple[str, int]], noun: str, alike: Alike | None) -> int | None:
    """Return the number of the first thing that a word means."""
    for name, number in names:
        if name == noun or (alike is not None and alike(noun, name)):
            return number
    return None


@cache
def alike_by(model: str) -> Alike:
    """Return AMBER's rule: the vectors of a spaCy model differ by an angle of cosine over 0.8.

    Raises:
        MissingExtraError: if spaCy is not installed.
        ConfigError: if it has no model of this name, or one that takes a cat for a dog.
    """
    try:
        import spacy  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise MissingExtraError("spacy", needed_for="scorer.vectors", extra="amber") from None
    try:
        read: Any = spacy.load(model)
    except OSError as error:
        raise ConfigError(
            f"scorer.vectors: spaCy has no model {model!r} ({error}). AMBER's own is "
            f"en_core_web_lg: `python -m spacy download en_core_web_lg`; or leave `vectors` out."
        ) from None
    one: Any = cache(read)
    if one(_TOLD_APART[0]).vector_norm > 0 and _same_vector(*map(one, _TOLD_APART)):
        raise ConfigError(
            f"scorer.vectors: {model} has one vector for {' and '.join(_TOLD_APART)}, because most "
            f"of its vectors were left out. AMBER's own model is en_core_web_lg: `python -m spacy "
            f"download en_core_web_lg`; or leave `vectors` out."
        )

    def alike(first: str, second: str) -> bool:
        a, b = one(first), one(second)
        # A word without a vector is like no other; spaCy would warn, and say 0.
        has_both = a.vector_norm > 0 and b.vector_norm > 0
        return bool(has_both and a.similarity(b) > _ALIKE_ABOVE)

    return alike


def _same_vector(first: Any, second: Any) -> bool:
    return bool(np.array_equal(first.vector, second.vector))


@scorers.register("amber_describe")
class AmberDescribeConfig(ScorerConfig):
    """AMBER's CHAIR: the share of mentions of things that are not there; lower is better.

    Beside it Cover (the share of things that are named), Hal (of descriptions with such a
    mention) and Cog (of likely imaginations that came true). A row's references are the things
    that are there; the likely ones stand in the column `hallu`.
    """

    metric = "CHAIR"
    lower_is_better = True
    is_share = False
    fact_columns = ("hallu",)
    file_fields = ("relation", "safe_words")

    relation: str = "relation.json"
    """AMBER's file of related words; a relative path begins beside the rows."""

    safe_words: str = "safe_words.txt"
    """AMBER's file of words that never count; a relative path begins beside the rows."""

    vectors: str = ""
    """A spaCy model with vectors, by which words are taken for one another."""

    def ready(self) -> None:
        """Fail if words or vectors cannot be had."""
        singular("dogs")
        self._words()
        if self.vectors:
            alike_by(self.vectors)

    @property
    def label(self) -> str:
        """Name, version and what tells words from one another, for logs."""
        return f"{super().label}/{Path(self.vectors).name if self.vectors else 'equal-words'}"

    def _words(self) -> Words:
        relation, safe = (
            str(Path(name).expanduser().absolute()) for name in (self.relation, self.safe_words)
        )
        return read_words(relation, safe)

    def mark(self, answer: str, target: Target) -> Mark:
        """1 if nothing is mentioned that is not there; the reading is what was mentioned."""
        if not answer.strip():
            return Mark(0.0, None)
        said = words_in(answer, self._words().known)
        shown = [word + (_NOT_THERE if self._count([word], target).wrong else "") for word in said]
        wrong = any(each.endswith(_NOT_THERE) for each in shown)
        return Mark(float(not wrong), ", ".join(shown) or _NOTHING)

    def _count(self, nouns: Sequence[str], target: Target) -> Counts:
        alike = alike_by(self.vectors) if self.vectors else None
        likely = tuple(map(str, target.facts["hallu"]))
        return count_mentions(nouns, target.references, likely, self._words(), alike)

    def fault(self, target: Target) -> str | None:
        """Refuse a row that does not say what is there, and what could be imagined."""
        if not isinstance(target.facts.get("hallu"), list | tuple):
            return "it has no list in the column hallu"
        return super().fault(target)

    def tallies(self, rows: Sequence[Row]) -> Floats:
        """For each row: the six counts, whether anything is wrong, and one."""
        table = np.zeros((len(rows), 8))
        for number, row in enumerate(rows):
            read = row.mark.reading
            said = [] if read in (None, _NOTHING) else str(read).split(", ")
            counts = self._count([word.removesuffix(_NOT_THERE) for word in said], row.target)
            table[number] = (*counts, float(counts.wrong > 0), 1.0)
        return table

    def value(self, totals: Floats) -> Floats:
        """Return the share of mentions that are wrong."""
        return totals[..., 0] / np.maximum(totals[..., 1], 1e-12)

    def also(self, rows: Sequence[Row]) -> dict[str, float]:
        """Cover, Hal and Cog."""
        totals = self.tallies(rows).sum(axis=0)
        pairs = {"Cover": (2, 3), "Hal": (6, 7), "Cog": (4, 5)}
        return {name: float(totals[a] / max(totals[b], 1e-12)) for name, (a, b) in pairs.items()}
