"""Yes and no about pictures that differ: HallusionBench, AMBER, BEAF.

Their scores are over figures, questions and pairs of pictures, and what counts as a hit
differs from an ordinary accuracy. `yes_no` reads the answers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from mmlm.evaluation.scorers.base import Mark, Row, ScorerConfig, Target, scorers
from mmlm.evaluation.scorers.yes_no import precision_recall, read_yes_no, truth
from mmlm.evaluation.statistics import Floats

Key = Callable[[Row], Hashable]


def all_right(rows: Sequence[Row], key: Key) -> float:
    """The share of groups in which every row is right; 0 where there are none."""
    groups: dict[Hashable, bool] = {}
    for row in rows:
        name = key(row)
        groups[name] = groups.get(name, True) and row.mark.score == 1.0
    return float(np.mean(list(groups.values()))) if groups else 0.0


def _facts(row: Row, *columns: str) -> tuple[str, ...]:
    return tuple(str(row.target.facts.get(column)) for column in columns)


@scorers.register("hallusion")
class HallusionConfig(ScorerConfig):
    """HallusionBench without a judge: the share of right answers (aAcc), with fAcc and qAcc.

    A figure counts if all its questions are right, a question if it is right on all figures.
    `mmlm` leaves questions without a figure out of fAcc, as the paper does; `vlmevalkit`
    keeps them; `lmms-eval` (its `intern` functions) calls everything with "yes" in it a yes.
    """

    metric = "aAcc"
    dialects = ("mmlm", "vlmevalkit", "lmms-eval")
    fact_columns = ("category", "subcategory", "set_id", "figure_id", "question_id")

    def mark(self, answer: str, target: Target) -> Mark:
        """Mark one answer."""
        if self.spoken == "lmms-eval":
            said = "yes" if "yes" in answer.lower() else "no"
        else:
            said = read_yes_no(answer, dialect=self.spoken)
        return Mark(float(said is not None and said == truth(target)), said)

    def fault(self, target: Target) -> str | None:
        """Refuse a row whose answer is neither, or which does not say what it belongs to."""
        missing = [name for name in self.fact_columns if name not in target.facts]
        if missing:
            return f"it has no column {', '.join(missing)}"
        return _neither(target)

    def also(self, rows: Sequence[Row]) -> dict[str, float]:
        """Return fAcc and qAcc."""
        figures = [
            row
            for row in rows
            if self.spoken == "vlmevalkit" or _facts(row, "category", "figure_id") != ("VS", "0")
        ]
        return {
            "fAcc": all_right(figures, lambda row: _facts(row, *self.fact_columns[:4])),
            "qAcc": all_right(
                rows,
                lambda row: _facts(row, "category", "subcategory", "set_id", "question_id"),
            ),
        }


def _neither(target: Target) -> str | None:
    if truth(target) is None:
        return f"its answer must be yes or no (got {', '.join(target.references)!r:.60})"
    return None


@scorers.register("amber")
class AmberConfig(ScorerConfig):
    """AMBER's questions: accuracy, and precision, recall and F1 of **no**.

    `official` takes "Yes" and "No" as they stand and nothing else; `mmlm` reads answers as
    people would. The descriptions of the benchmark have a scorer of their own, `amber_describe`.
    """

    dialects = ("official", "mmlm")

    def mark(self, answer: str, target: Target) -> Mark:
        """Mark one answer."""
        if self.spoken == "official":
            said = {"Yes": "yes", "No": "no"}.get(answer)
        else:
            said = read_yes_no(answer)
        return Mark(float(said is not None and said == truth(target)), said)

    def fault(self, target: Target) -> str | None:
        """Refuse a row whose answer is neither."""
        return _neither(target)

    def also(self, rows: Sequence[Row]) -> dict[str, float]:
        """Precision, recall and F1 of no: the share of things that are not there and are denied."""
        said = [row.mark.reading == "no" for row in rows]
        true = [truth(row.target) == "no" for row in rows]
        return {f"{name}_of_no": value for name, value in precision_recall(said, true).items()}


def read_beaf(answer: str) -> str | None:
    """Read ``yes`` or ``no`` as BEAF's script does: letters in a row, yes before no.

    >>> [read_beaf(text) for text in ("I don't know", "None", "yes or no", "maybe")]
    ['no', 'no', 'yes', None]
    """
    lower = answer.lower()
    return "yes" if "yes" in lower else "no" if "no" in lower else None


@scorers.register("beaf")
class BeafConfig(ScorerConfig):
    """BEAF: does the answer change when the thing is taken out of the picture?

    Over questions about the thing that was taken out: TU (a right yes becomes a right no), IG,
    SB+ and SB−; over all others ID, the share whose outcome changes although it should not.
    The score is the harmonic mean of TU and 1 - ID. `official` keeps its script's habit of
    giving an unreadable answer the reading of the row before; in `mmlm` it is wrong.
    """

    metric = "F1 of TU and ID"
    is_share = False
    dialects = ("mmlm", "official")
    fact_columns = ("image", "question", "orig_img", "removed_q")

    def mark(self, answer: str, target: Target) -> Mark:
        """Mark one answer."""
        said = read_beaf(answer) if self.spoken == "official" else read_yes_no(answer)
        return Mark(float(said is not None and said == truth(target)), said)

    def settle(self, answers: Sequence[str], rows: Sequence[Row]) -> list[Mark]:
        """In `official`, give an unreadable answer the reading of the row before."""
        marks = [row.mark for row in rows]
        if self.spoken != "official":
            return marks
        before: str | None = None
        for number, row in enumerate(rows):
            if row.mark.reading is None and before is not None:
                marks[number] = Mark(float(before == truth(row.target)), before)
            before = marks[number].reading
        return marks

    def fault(self, target: Target) -> str | None:
        """Refuse a row whose answer is neither, or which does not say which picture it shows."""
        missing = [name for name in self.fact_columns if name not in target.facts]
        if missing:
            return f"it has no column {', '.join(missing)}"
        return _neither(target)

    def tallies(self, rows: Sequence[Row]) -> Floats:
        """For each edited row: TU, IG, SB+, SB−, questions; changed, other questions."""
        table = np.zeros((len(rows), 7))
        before = {
            (_original(row), _facts(row, "question")): row for row in rows if _is(row, "orig_img")
        }
        for number, row in enumerate(rows):
            first = before.get((_original(row), _facts(row, "question")))
            if _is(row, "orig_img") or first is None:
                continue
            was, now = (each.mark.score == 1.0 for each in (first, row))
            if _is(row, "removed_q"):
                outcome = {(True, True): 0, (False, False): 1, (True, False): 2, (False, True): 3}
                table[number, outcome[was, now]] = table[number, 4] = 1.0
            else:
                table[number, 5:] = float(was != now), 1.0
        return table

    def value(self, totals: Floats) -> Floats:
        """Return the harmonic mean of TU and 1 - ID."""
        right = totals[..., 0] / np.maximum(totals[..., 4], 1e-12)
        kept = 1 - totals[..., 5] / np.maximum(totals[..., 6], 1e-12)
        return 2 * right * kept / np.maximum(right + kept, 1e-12)

    def also(self, rows: Sequence[Row]) -> dict[str, float]:
        """Return the parts of the score."""
        totals = self.tallies(rows).sum(axis=0)
        names = ("TU", "IG", "SB+", "SB-")
        parts = {name: float(totals[n] / max(totals[4], 1e-12)) for n, name in enumerate(names)}
        return {**parts, "ID": float(totals[5] / max(totals[6], 1e-12))}


def _is(row: Row, column: str) -> bool:
    value: Any = row.target.facts.get(column)
    return value.strip().lower() in ("true", "1") if isinstance(value, str) else bool(value)


def _original(row: Row) -> str:
    """Return the name of the picture before the edit: ``a_01.jpg`` was ``a.jpg``."""
    name = str(row.target.facts.get("image"))
    return name if _is(row, "orig_img") else name[:-7] + ".jpg"
