"""Boxes: whether the answer points at the thing (RefCOCO and its kin)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Literal

from mmlm.evaluation.scorers.base import Mark, ScorerConfig, Target, scorers

_NUMBER = r"-?\d+(?:\.\d+)?|-?\.\d+"
_BRACKETS = re.compile(
    rf"\[\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\]"
)
_PLAIN = r"(-?\d+(?:\.\d+)?)"
_LMMS_EVAL = re.compile(rf"\[\s*{_PLAIN},\s*{_PLAIN},\s*{_PLAIN},\s*{_PLAIN}\s*\]")
_ANY_FOUR = re.compile(rf"({_NUMBER})\D+?({_NUMBER})\D+?({_NUMBER})\D+?({_NUMBER})")
_EPSILON = 1e-6

Box = tuple[float, float, float, float]


def read_box(answer: str, *, dialect: str = "mmlm") -> Box | None:
    """The first box in a text, as left, top, right, bottom; corners are put in order.

    `lmms-eval` takes ``[a, b, c, d]`` alone, with a digit before every point, and corners as
    they stand.

    >>> read_box("It is at [0.5, 0.1, 0.1, 0.5]."), read_box("(10,10,50,50)")
    ((0.1, 0.1, 0.5, 0.5), (10.0, 10.0, 50.0, 50.0))
    >>> read_box("(.1,.1,.5,.5)", dialect="lmms-eval") is None
    True
    """
    if dialect == "lmms-eval":
        found = _LMMS_EVAL.search(answer)
    else:
        found = _BRACKETS.search(answer) or _ANY_FOUR.search(answer)
    if found is None:
        return None
    a, b, c, d = (float(number) for number in found.groups())
    if dialect == "mmlm":
        return min(a, c), min(b, d), max(a, c), max(b, d)
    return a, b, c, d


def overlap(first: Sequence[float], second: Sequence[float]) -> float:
    """Intersection over union of two boxes; 0 where both are empty.

    >>> overlap((0, 0, 2, 2), (1, 0, 3, 2))
    0.333...
    """
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(width, 0.0) * max(height, 0.0)
    areas = sum(max(b[2] - b[0], 0.0) * max(b[3] - b[1], 0.0) for b in (first, second))
    union = areas - shared
    return shared / union if union > 0 else 0.0


def _references(target: Target) -> list[list[float]]:
    """Return the boxes of a row: each a text such as ``[0, 0, 1, 1]``, or one as four numbers."""
    values = [json.loads(text) for text in target.references]
    if len(values) == 4 and all(isinstance(value, int | float) for value in values):
        values = [values]
    if not all(isinstance(value, list) and len(value) == 4 for value in values):
        raise ValueError(target.references)
    return [[float(number) for number in value] for value in values]


@scorers.register("box")
class BoxConfig(ScorerConfig):
    """The answer's box and the reference's share at least half of their union."""

    version = 2
    metric = "accuracy at IoU 0.5"
    dialects = ("mmlm", "lmms-eval")

    threshold: float = 0.5
    """Smallest intersection over union that counts."""

    form: Literal["corners", "sides"] = "corners"
    """A reference is left, top, right, bottom; or left, top, width, height."""

    pixels: bool = False
    """References are in pixels (the benchmark needs `image_size: true`), answers from 0 to 1."""

    def mark(self, answer: str, target: Target) -> Mark:
        """Mark one answer."""
        box = read_box(answer, dialect=self.spoken)
        if box is None:
            return Mark(0.0, None)
        # A half that floats put at 0.49999999 is a half; the other dialect has no such mercy.
        mercy = _EPSILON if self.spoken == "mmlm" else 0.0
        best = max(overlap(box, reference) for reference in self._boxes(target))
        return Mark(float(best >= self.threshold - mercy), ", ".join(f"{x:g}" for x in box))

    def _boxes(self, target: Target) -> list[list[float]]:
        """Return the references of a row as left, top, right, bottom, as answers are."""
        boxes = _references(target)
        if self.form == "sides":
            boxes = [[left, top, left + w, top + h] for left, top, w, h in boxes]
        if self.pixels:
            width, height = (float(target.facts[f"image_{side}"]) for side in ("width", "height"))
            boxes = [[a / width, b / height, c / width, d / height] for a, b, c, d in boxes]
        return boxes

    def fault(self, target: Target) -> str | None:
        """Refuse a row without a box."""
        if self.pixels and "image_width" not in target.facts:
            return "its box is in pixels, and the benchmark does not say image_size: true"
        try:
            self._boxes(target)
        except (ValueError, TypeError):
            got = ", ".join(target.references)
            return f"its answer must be a box [left, top, right, bottom] (got {got!r:.60})"
        return super().fault(target)
