"""What the picture carries: how much of each score is gone without it, in sentences.

The numbers are those of `details.json`: differences between the pass with the image and the
others on the same items, with intervals. Used by the page and by the terminal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmlm.reports.tables import CONDITION_NAMES

_LOOKS = ("blind", "shuffled")


def carried(details: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each kind of question that was also asked without its picture.

    >>> against = {"n": 40, "difference": 0.3, "low": 0.2, "high": 0.4, "share_of_score": 0.6}
    >>> carried({"questions": [{"set": "a", "question": "b", "against": {"blind": against}}]})
    ['a · b: 60 % of the score is gone blind (30.0 points, 20.0 to 40.0)']
    """
    told: list[str] = []
    for question in details.get("questions", []):
        against = question.get("against") or {}
        parts = [
            _part(question, CONDITION_NAMES[name], against[name])
            for name in _LOOKS
            if against.get(name, {}).get("n")
        ]
        if parts:
            told.append(f"{question['set']} · {question['question']}: {'; '.join(parts)}")
    return told


def _part(question: Mapping[str, Any], condition: str, found: Mapping[str, Any]) -> str:
    unit = 1 if str(question.get("metric", "")).endswith("points") else 100
    gain, low, high = (unit * found[key] for key in ("difference", "low", "high"))
    if question.get("lower_is_better"):
        gain, low, high = -gain, -high, -low
    points = f"{gain:.1f} points, {low:.1f} to {high:.1f}"
    if low <= 0 <= high:
        return f"{condition}, no difference is sure ({points})"
    share = found.get("share_of_score")
    if share is None:
        return f"{condition}, it is {'worse' if gain > 0 else 'better'} ({points})"
    if share < 0:
        return f"{condition}, it is better than with the image ({points})"
    return f"{100 * share:.0f} % of the score is gone {condition} ({points})"
