"""VQA accuracy: how many of ten people agree with the answer (VQAv2, TextVQA, VizWiz, OK-VQA).

An answer that k of the ten gave is worth min(1, k/3), averaged over leaving each person out:
1 gives 0.3, 2 gives 0.6, 3 gives 0.9, 4 and more give 1. The dialects differ in what is done
to the texts before they are compared, and when.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from mmlm.evaluation.scorers.base import Mark, ScorerConfig, Target, scorers

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS: dict[str, str] = dict(
    zip(
        ("none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
         "ten"),
        ("0", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10"),
        strict=True,
    )
)  # fmt: skip
_ARTICLES = frozenset({"a", "an", "the"})
_DIGIT_COMMA = re.compile(r"(\d)(,)(\d)")
_PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")
"""The script's own: it misspells a look-behind, so a period before a non-digit always goes."""
_PERIOD_BETWEEN = re.compile(r"(?<!\d)\.(?!\d)")
# The script passes re.UNICODE where the number of replacements belongs.
_MOST_PERIODS = int(re.UNICODE)

_STEMS = (
    "ain", "aren", "couldn", "didn", "doesn", "don", "hadn", "hasn", "haven", "isn", "mightn",
    "mustn", "needn", "shan", "shouldn", "wasn", "weren", "won", "wouldn",
)  # fmt: skip
_CONTRACTIONS = {f"{stem}t": f"{stem}'t" for stem in _STEMS} | {
    "cant": "can't", "couldve": "could've", "couldnve": "couldn't've", "hed": "he'd",
    "hes": "he's", "howd": "how'd", "howll": "how'll", "hows": "how's", "im": "i'm",
    "ive": "i've", "itd": "it'd", "itll": "it'll", "lets": "let's", "maam": "ma'am",
    "mightve": "might've", "mustve": "must've", "oclock": "o'clock", "shes": "she's",
    "shouldve": "should've", "somebodys": "somebody's", "someones": "someone's",
    "somethingd": "something'd", "somethings": "something's", "thats": "that's",
    "thered": "there'd", "theres": "there's", "theyd": "they'd", "theyll": "they'll",
    "theyre": "they're", "theyve": "they've", "twas": "'twas", "weve": "we've",
    "whatll": "what'll", "whatre": "what're", "whats": "what's", "whatve": "what've",
    "whens": "when's", "whered": "where'd", "wheres": "where's", "whereve": "where've",
    "whod": "who'd", "wholl": "who'll", "whos": "who's", "whove": "who've", "whyll": "why'll",
    "whyre": "why're", "whys": "why's", "wouldve": "would've", "yall": "y'all",
    "youd": "you'd", "youll": "you'll", "youre": "you're", "youve": "you've",
}  # fmt: skip


def vqa_accuracy(answer: str, people: Sequence[str], *, dialect: str = "official") -> float:
    """The share of people, leaving each out in turn, whom the answer satisfies.

    `official` normalises only where the people disagree; `lmms-eval` (its VQAv2) always does.
    So does `llava` (TextVQA's evaluator), which lmms-eval also takes for TextVQA, VizWiz and
    OK-VQA; and `vlmevalkit`, with another rule for periods.

    >>> [vqa_accuracy("red", ["red"] * k + ["blue"] * (10 - k)) for k in range(6)]
    [0.0, 0.3, 0.6, 0.9, 1.0, 1.0]
    >>> [vqa_accuracy("Yes", ["yes"] * 10, dialect=name) for name in ("official", "lmms-eval")]
    [0.0, 1.0]
    >>> [vqa_accuracy("5.", ["5"] * 5 + ["6"] * 5, dialect=d) for d in ("official", "vlmevalkit")]
    [1.0, 0.0]
    >>> people = ["john 's"] * 5 + ["x"] * 5
    >>> [vqa_accuracy("John's", people, dialect=d) for d in ("official", "llava")]
    [0.0, 1.0]
    """
    change = _NORMALISERS[dialect]
    said, given = _tidy(answer), [_tidy(person) for person in people]
    if dialect != "official" or len(set(given)) > 1:
        said, given = change(said), [change(person) for person in given]
    shares = [
        min(1.0, sum(other == said for other in given[:index] + given[index + 1 :]) / 3)
        for index in range(len(given))
    ]
    return round(sum(shares) / len(shares), 6)


def _tidy(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _official(text: str) -> str:
    return _words(_punctuation(text, _PERIOD))


def _vlmevalkit(text: str) -> str:
    return _words(vlmevalkit_punctuation(text))


def vlmevalkit_punctuation(text: str) -> str:
    """Take the punctuation out of a text as VLMEvalKit does, for VQA and for yes and no alike.

    >>> vlmevalkit_punctuation("Yes, a 2.5 (or 3)."), vlmevalkit_punctuation("yes:no")
    ('Yes a 2.5 or 3 ', 'yes:no')
    """
    return _punctuation(text, _PERIOD_BETWEEN)


def _llava(text: str) -> str:
    """TextVQA's evaluator splits off a possessive and drops commas and question marks first."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return _official(text.strip())


def _punctuation(text: str, period: re.Pattern[str]) -> str:
    """Delete a mark that touches a space, and all where a number has a comma; else put a space.

    What touches what is seen in the text as it was.
    """
    changed, all_go = text, _DIGIT_COMMA.search(text) is not None
    for mark in _MARKS:
        delete = all_go or mark + " " in text or " " + mark in text
        changed = changed.replace(mark, "" if delete else " ")
    return period.sub("", changed, count=_MOST_PERIODS)


def _words(text: str) -> str:
    """Lower-case, numbers as digits, no articles, contractions with their apostrophe."""
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


_NORMALISERS: dict[str, Callable[[str], str]] = {
    "official": _official,
    "llava": _llava,
    "lmms-eval": _official,
    "vlmevalkit": _vlmevalkit,
}


@scorers.register("vqa")
class VQAConfig(ScorerConfig):
    """How many of the annotators agree (VQAv2, TextVQA, VizWiz, OK-VQA)."""

    metric = "VQA accuracy"
    version = 2
    dialects = ("official", "llava", "lmms-eval", "vlmevalkit")

    num_annotators: int = 10
    """How many answers a row must have; fewer would make every score another number."""

    def mark(self, answer: str, target: Target) -> Mark:
        """Mark one answer."""
        score = vqa_accuracy(answer, target.references, dialect=self.spoken)
        return Mark(score, answer.strip() or None)

    def fault(self, target: Target) -> str | None:
        """Refuse a row with another number of annotators."""
        if len(target.references) != self.num_annotators:
            return (
                f"it has the answers of {len(target.references)} annotators, not "
                f"{self.num_annotators} (scorer.num_annotators)"
            )
        return None
