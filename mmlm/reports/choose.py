"""Which answers a report shows: a fair draw from each kind of question, and some of the wrong ones.

The draw is by a hash of the item's name, so that two runs show the same items and nobody
chose the pretty ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmlm.reports.contact_sheet import Shown

Row = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """One answer of the report, and what the model said about the same item otherwise."""

    row: Row
    picture: Any
    others: Mapping[str, str]

    @property
    def is_right(self) -> bool:
        """Whether the answer got at least half of the mark."""
        return float(self.row["score"]) >= 0.5

    def shown(self) -> Shown:
        """Return the card of the contact sheet."""
        row = self.row
        return Shown(
            self.picture,
            str(row["prompt"]),
            str(row["answer"]),
            truth_of(row),
            self.is_right,
            f"{row['set']} · {row['question']}",
        )


def truth_of(row: Row) -> str:
    """Return the truth as a person would say it: the first reference, or the commonest of many.

    >>> truth_of({"references": ["blue", "red", "red"]})
    'red'
    """
    references = [str(text) for text in row["references"]]
    return max(references, key=references.count) if references else ""


def examples(
    predictions: Sequence[Row],
    *,
    drawn: int,
    wrong: int,
    pictures: Mapping[str, Any] | None = None,
) -> dict[tuple[str, str], tuple[list[Example], list[Example]]]:
    """Choose examples of each set and kind of question.

    Args:
        predictions: Lines of `predictions.jsonl`.
        drawn: How many are drawn fairly, right or wrong as they come.
        wrong: How many further wrong ones.
        pictures: Pictures by key, for those that are no files.

    Returns:
        For each set and kind: the fair draw, and further wrong ones.
    """
    by_item: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in predictions:
        item = (row["set"], row["question"], row["id"])
        by_item.setdefault(item, {})[row["condition"]] = row
    groups: dict[tuple[str, str], list[Example]] = {}
    for (name, question, _), rows in by_item.items():
        if "image" in rows:
            others = {key: str(row["answer"]) for key, row in rows.items() if key != "image"}
            example = Example(rows["image"], _picture(rows["image"], pictures or {}), others)
            groups.setdefault((name, question), []).append(example)
    found: dict[tuple[str, str], tuple[list[Example], list[Example]]] = {}
    for key, members in groups.items():
        members.sort(key=lambda example: _lot(example.row))
        further = [example for example in members[drawn:] if not example.is_right]
        found[key] = (members[:drawn], further[:wrong])
    return found


def _lot(row: Row) -> str:
    return hashlib.sha256(f"{row['set']} {row['id']}".encode()).hexdigest()


def _picture(row: Row, pictures: Mapping[str, Any]) -> Any:
    for key in row.get("image_keys", ()):
        if key in pictures:
            return pictures[key]
    paths = row.get("images") or [None]
    return paths[0]
