"""Yes or no: plain, and as the scripts of POPE and MME read it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmlm.evaluation.scorers.base import Mark, Row, ScorerConfig, Target, scorers
from mmlm.evaluation.scorers.text import words_of
from mmlm.evaluation.scorers.vqa import vlmevalkit_punctuation
from mmlm.evaluation.statistics import Floats

_YES = frozenset({"yes", "yeah", "yep"})
_NO = frozenset({"no", "nope"})


def read_yes_no(answer: str, *, dialect: str = "mmlm") -> str | None:
    """Read ``yes`` or ``no`` in an answer, or None.

    `mmlm`: the first word that is one of them, but both, joined by "or", are neither.
    `official`: POPE's script (also LLaVA's): no, not or No before the first period means
    no, **everything else means yes**. `lmms-eval`: the whole answer, lower-cased and
    stripped. `vlmevalkit`: one of the words, without punctuation, but not both.

    >>> [read_yes_no(text) for text in ("No, there is none.", "Yes, there is no doubt.", "dog")]
    ['no', 'yes', None]
    >>> [read_yes_no("NO", dialect=name) for name in ("official", "lmms-eval", "vlmevalkit")]
    ['yes', 'no', 'no']
    >>> [read_yes_no("There isn't a dog.", dialect=name) for name in ("official", "vlmevalkit")]
    ['yes', None]
    """
    return _READERS[dialect](answer)


def _plain(answer: str) -> str | None:
    words = words_of(answer)
    said = ["yes" if word in _YES else "no" for word in words if word in _YES | _NO]
    if re.search(r"\byes or no\b|\bno or yes\b", " ".join(words)) and len(said) == 2:
        return None
    return said[0] if said else None


def _pope(answer: str) -> str | None:
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def _whole(answer: str) -> str | None:
    said = answer.strip().lower()
    return said if said in ("yes", "no") else None


def _one_word(answer: str) -> str | None:
    words = vlmevalkit_punctuation(answer.lower()).split()
    said = {"yes", "no"} & set(words)
    return said.pop() if len(said) == 1 else None


_READERS = {
    "mmlm": _plain,
    "official": _pope,
    "llava": _pope,
    "lmms-eval": _whole,
    "vlmevalkit": _one_word,
}


@scorers.register("yes_no")
class YesNoConfig(ScorerConfig):
    """The answer says yes where it should, and no where it should (POPE and its kin)."""

    version = 2
    dialects = ("mmlm", "official", "llava", "lmms-eval", "vlmevalkit")

    def mark(self, answer: str, target: Target) -> Mark:
        """Mark one answer."""
        said = read_yes_no(answer, dialect=self.spoken)
        return Mark(float(said is not None and said == truth(target)), said)

    def fault(self, target: Target) -> str | None:
        """Refuse a row whose answer is neither."""
        if truth(target) is None:
            return f"its answer must be yes or no (got {', '.join(target.references)!r})"
        return None

    def also(self, rows: Sequence[Row]) -> dict[str, float]:
        """Precision, recall and F1 of yes, and how often yes was said.

        Over several groups, such as POPE's three splits, also the mean of their F1, which is the
        number that LLaVA's tables print.
        """
        yes = np.array([row.mark.reading == "yes" for row in rows])
        true = np.array([truth(row.target) == "yes" for row in rows])
        found = {**precision_recall(yes, true), "yes_share": float(yes.mean())}
        groups = sorted({row.group for row in rows})
        if len(groups) > 1:
            own = [np.array([row.group == name for row in rows]) for name in groups]
            of_each = [precision_recall(yes[mask], true[mask])["f1"] for mask in own]
            found["f1_mean_of_groups"] = float(np.mean(of_each))
        return found


def truth(target: Target) -> str | None:
    """The answer that a row holds, as ``yes`` or ``no``; 1 and 0, true and false count too."""
    first = target.references[0].strip().strip(".").lower() if target.references else ""
    return {"yes": "yes", "no": "no", "true": "yes", "false": "no", "1": "yes", "0": "no"}.get(
        first
    )


def precision_recall(said: Sequence[bool] | Any, true: Sequence[bool] | Any) -> dict[str, float]:
    """Precision, recall and F1; 0 where nothing was said (POPE's script divides by zero).

    >>> precision_recall([True, True, False, False, True], [True, True, False, True, False])["f1"]
    0.666...
    """
    yes, positive = np.asarray(said, dtype=bool), np.asarray(true, dtype=bool)
    hits = float((yes & positive).sum())
    precision = hits / max(float(yes.sum()), 1.0)
    recall = hits / max(float(positive.sum()), 1.0)
    f1 = 2 * precision * recall / max(precision + recall, 1e-12)
    return {"precision": precision, "recall": recall, "f1": f1}


def read_mme(answer: str, *, dialect: str = "official") -> str | None:
    """Read ``yes`` or ``no`` as MME's script does: whole, else within the first four characters.

    >>> [read_mme(text) for text in ("Yes", "None", "yesterday", "  Yes", "The answer is yes")]
    ['yes', 'no', 'yes', None, None]
    >>> [read_mme(text, dialect="lmms-eval") for text in ("  Yes", "Y", "I know it is yes")]
    ['yes', 'yes', None]
    """
    said = answer.lower()
    if dialect == "lmms-eval":
        said = said.strip().replace(".", "")
        said = {"y": "yes", "n": "no"}.get(said, said)
    if said in ("yes", "no"):
        return said
    start = said[:4]
    return "yes" if "yes" in start else "no" if "no" in start else None


@scorers.register("mme")
class MMEConfig(ScorerConfig):
    """MME: accuracy plus accuracy+ (both questions of a picture right), 200 points a subtask.

    The groups of the benchmark are the subtasks; the score is the sum over them.
    """

    metric = "MME points"
    is_share = False
    dialects = ("official", "lmms-eval")

    def mark(self, answer: str, target: Target) -> Mark:
        """Mark one answer."""
        said = read_mme(answer, dialect=self.spoken)
        return Mark(float(said is not None and said == truth(target)), said)

    def fault(self, target: Target) -> str | None:
        """Refuse a row whose answer is neither."""
        return (
            None if truth(target) else f"its answer must be yes or no (got {target.references!r})"
        )

    def tallies(self, rows: Sequence[Row]) -> Floats:
        """For each subtask: right, questions, pictures with all right, pictures.

        A picture's share is put on its first row, so that the sums come out right whichever
        rows are drawn together.
        """
        groups = sorted({row.group for row in rows})
        table = np.zeros((len(rows), len(groups), 4))
        pictures: dict[tuple[str, str], list[int]] = {}
        for number, row in enumerate(rows):
            pictures.setdefault((row.group, row.image), []).append(number)
        for (group, _), members in pictures.items():
            column = groups.index(group)
            for number in members:
                table[number, column, :2] = rows[number].mark.score, 1.0
            both = all(rows[number].mark.score == 1.0 for number in members)
            table[members[0], column, 2:] = float(both), 1.0
        return table.reshape(len(rows), -1)

    def value(self, totals: Floats) -> Floats:
        """Sum over the subtasks of 100 · accuracy + 100 · accuracy+."""
        by_task = totals.reshape(*totals.shape[:-1], -1, 4)
        shares = by_task[..., (0, 2)] / np.maximum(by_task[..., (1, 3)], 1e-12)
        return 100 * shares.sum(axis=(-1, -2))
