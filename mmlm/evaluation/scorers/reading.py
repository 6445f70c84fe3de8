"""Answers that are read off the picture: documents, charts, signs.

ANLS (DocVQA, InfoVQA), relaxed accuracy (ChartQA) and containment (OCRBench).
"""

from __future__ import annotations

from collections.abc import Sequence

from mmlm.evaluation.scorers.base import Mark, ScorerConfig, Target, scorers


def anls(answer: str, references: Sequence[str], *, dialect: str = "official") -> float:
    """Average normalised Levenshtein similarity, of the best reference; below 0.5 it is 0.

    `official` (the competition's script) gives 0.5 at exactly a half, `paper` gives 0 there.
    `lmms-eval` and `vlmevalkit` divide by the lengths before spaces were cut.

    >>> anls("Paris", ["paris"]), round(anls("parsi", ["paris"]), 4)
    (1.0, 0.6)
    >>> anls("abcd", ["abef"]), anls("abcd", ["abef"], dialect="paper")
    (0.5, 0.0)
    >>> round(anls("$ 1,000", ["$1,000"]), 4), anls("Total: 12", ["12"])
    (0.8571, 0.0)
    >>> round(anls("parsi" + " " * 10, ["paris"], dialect="lmms-eval"), 4)
    0.8667
    """
    return max(_similarity(answer, reference, dialect) for reference in references)


def _similarity(answer: str, reference: str, dialect: str) -> float:
    said, wanted = (" ".join(text.strip().lower().split()) for text in (answer, reference))
    raw = dialect in ("lmms-eval", "vlmevalkit")
    longest = max(len(answer), len(reference)) if raw else max(len(said), len(wanted))
    if longest == 0:
        return 1.0
    distance = levenshtein(said, wanted) / longest
    similarity = 1 - distance
    too_far = distance >= 0.5 if dialect == "paper" else similarity < 0.5
    return 0.0 if too_far else similarity


def levenshtein(first: str, second: str) -> int:
    """How many letters must be put in, taken out or replaced.

    By rapidfuzz where it is installed (`mmlm[eval]`); long answers are slow without it.

    >>> levenshtein("kitten", "sitting"), levenshtein_plainly("kitten", "sitting")
    (3, 3)
    """
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError:
        return levenshtein_plainly(first, second)
    return int(Levenshtein.distance(first, second))


def levenshtein_plainly(first: str, second: str) -> int:
    """The same, without rapidfuzz."""
    if len(first) < len(second):
        first, second = second, first
    before = list(range(len(second) + 1))
    for row, left in enumerate(first, start=1):
        now = [row]
        for column, right in enumerate(second, start=1):
            now.append(min(before[column] + 1, now[-1] + 1, before[column - 1] + (left != right)))
        before = now
    return before[-1]


def relaxed_accuracy(answer: str, reference: str, *, tolerance: float = 0.05) -> float:
    """1 if two numbers differ by at most 5 %, or two texts are equal but for case (ChartQA).

    The quirks are those of the published function: a reference of 0 is compared as text, and
    thousands separators make a number a text.

    >>> [relaxed_accuracy(a, b) for a, b in (("10.5", "10"), ("10.51", "10"), ("45%", "0.45"))]
    [1.0, 0.0, 1.0]
    >>> [relaxed_accuracy(a, b) for a, b in (("45", "45%"), ("0.0", "0"), ("1,000", "1000"))]
    [0.0, 0.0, 0.0]
    >>> [relaxed_accuracy(a, b) for a, b in (("$5", "5"), ("2010", "2011"), ("yes.", "yes"))]
    [0.0, 1.0, 0.0]
    >>> relaxed_accuracy("nan", "5"), relaxed_accuracy("Yes", "yes")
    (0.0, 1.0)
    """
    said, wanted = _number(answer), _number(reference)
    if said is not None and wanted:
        change = abs(said - wanted) / abs(wanted)
        # A comparison with NaN is false.
        return float(change <= tolerance)
    return float(answer.lower() == reference.lower())


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def contains(answer: str, references: Sequence[str], *, formula: bool = False) -> float:
    """1 if a reference stands anywhere in the answer, letters within words included (OCRBench).

    Formulas (HME100K) are compared without spaces, and with their case.

    >>> contains("The word is CENTRE", ["centre"]), contains("12345", ["234"])
    (1.0, 1.0)
    >>> contains("cent re", ["centre"]), contains("X^2", ["x^2"], formula=True)
    (0.0, 0.0)
    """

    def tidy(text: str) -> str:
        if formula:
            return text.strip().replace("\n", " ").replace(" ", "")
        return text.lower().strip().replace("\n", " ")

    return float(any(tidy(reference) in tidy(answer) for reference in references))


_WIDE = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}


def narrow(text: str) -> str:
    """Turn full-width Latin letters, digits and marks into ordinary ones, and nothing else.

    >>> narrow("ＡＢ１２！ ½")
    'AB12! ½'
    """
    return text.translate(_WIDE)


@scorers.register("anls")
class ANLSConfig(ScorerConfig):
    """How near the letters are to the best reference (DocVQA, InfoVQA)."""

    metric = "ANLS"
    dialects = ("official", "paper", "lmms-eval", "vlmevalkit")

    def mark(self, answer: str, target: Target) -> Mark:
        """Mark one answer."""
        score = anls(answer[:_LONGEST], target.references, dialect=self.spoken)
        return Mark(score, answer.strip()[:_LONGEST] or None)


_LONGEST = 20_000
"""Letters of an answer that ANLS compares: beyond it, the similarity is 0 in any case."""


@scorers.register("relaxed")
class RelaxedConfig(ScorerConfig):
    """The number within 5 %, or the same text (ChartQA)."""

    metric = "relaxed accuracy"

    def mark(self, answer: str, target: Target) -> Mark:
        """Mark one answer."""
        score = max(relaxed_accuracy(answer, reference) for reference in target.references)
        return Mark(score, answer.strip() or None)


@scorers.register("contains")
class ContainsConfig(ScorerConfig):
    """A reference stands in the answer, letter by letter (OCRBench)."""

    version = 2
    dialects = ("official", "lmms-eval")

    def mark(self, answer: str, target: Target) -> Mark:
        """Mark one answer."""
        references = target.references
        if self.spoken == "lmms-eval":
            answer = answer.strip()
            if target.facts.get("dataset") != "HME100k":
                answer, references = narrow(answer), tuple(map(narrow, references))
        # OCRBench compares the rows of this source, handwritten formulas, without spaces.
        formula = target.facts.get("dataset") == "HME100k"
        score = contains(answer, references, formula=formula)
        return Mark(score, answer.strip() or None)
