"""Tables of scores: for the terminal, and as Markdown for a model card.

A row is an entry of `results.json`: ``{set, question, condition, n, score, low, high, …}``.
One line of a table is one kind of question of one set, with its conditions side by side.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

CONDITION_NAMES = {
    "image": "with image",
    "blind": "blind",
    "shuffled": "shuffled image",
    "permuted": "permuted options",
    "nearest_neighbour": "nearest neighbour",
}
"""What people read for the conditions of `results.json`, in the order of the columns."""


def by_question(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    """Group scores: ``{(set, question): {condition: row}}``, in order of first appearance."""
    grouped: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        grouped.setdefault((row["set"], row["question"]), {})[row["condition"]] = row
    return grouped


def conditions_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the conditions that occur, in the order in which tables show them."""
    found = {row["condition"] for row in rows}
    known = [name for name in CONDITION_NAMES if name in found]
    return known + sorted(found - set(known))


def score_text(row: dict[str, Any] | None) -> str:
    """Put a score with its interval: shares as percent, points as they are.

    >>> score_text({"score": 0.914, "low": 0.895, "high": 0.93, "metric": "accuracy"})
    '91.4 (89.5–93.0)'
    >>> score_text(None)
    '–'
    """
    if row is None:
        return "–"
    factor = 1 if str(row.get("metric", "")).endswith("points") else 100
    score, low, high = (factor * row[key] for key in ("score", "low", "high"))
    return f"{score:.1f} ({low:.1f}–{high:.1f})"


def kind_text(kind: str, row: Mapping[str, Any]) -> str:
    """Put the name of a question; an arrow says where a smaller score is the better one.

    >>> kind_text("chair", {"lower_is_better": True}), kind_text("choice", {})
    ('chair ↓', 'choice')
    """
    return f"{kind} ↓" if row.get("lower_is_better") else kind


def percent(value: float | None) -> str:
    """Put a share as percent.

    >>> percent(0.25), percent(None)
    ('25.0', '–')
    """
    return "–" if value is None else f"{100 * value:.1f}"


def scores_table(rows: Sequence[dict[str, Any]], *, title: str = "") -> Table:
    """Return the scores as a table for the terminal."""
    conditions = conditions_of(rows)
    table = Table(title=title or None, title_justify="left", caption_justify="left")
    table.caption = "In percent, with 95 % intervals; blind: the same question without the image."
    table.add_column("set")
    table.add_column("question")
    table.add_column("n", justify="right")
    for condition in conditions:
        table.add_column(CONDITION_NAMES.get(condition, condition), justify="right")
    table.add_column("chance", justify="right")
    table.add_column("unreadable", justify="right")
    for (name, question), found in by_question(rows).items():
        first = found.get("image") or next(iter(found.values()))
        table.add_row(
            name,
            kind_text(question, first),
            f"{first['n']:,}",
            *(score_text(found.get(condition)) for condition in conditions),
            percent(first.get("chance")),
            percent(first.get("parse_fail_rate")),
        )
    return table


def plain_table(rows: Sequence[dict[str, Any]], *, title: str = "", width: int = 120) -> str:
    """Return the terminal's table as text without colours."""
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
    with console.capture() as caught:
        console.print(scores_table(rows, title=title))
    return caught.get()


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the scores as a Markdown table, for a model card.

    >>> row = {"set": "birds", "question": "choice", "n": 1000, "score": 0.9, "low": 0.88,
    ...        "high": 0.92, "metric": "accuracy"}
    >>> print(markdown_table([{**row, "condition": "image"}, {**row, "condition": "blind"}]))
    | set | question | n | with image | blind |
    | --- | --- | ---: | ---: | ---: |
    | birds | choice | 1,000 | 90.0 (88.0–92.0) | 90.0 (88.0–92.0) |
    """
    conditions = conditions_of(rows)
    heads = ["set", "question", "n", *(CONDITION_NAMES.get(name, name) for name in conditions)]
    lines = [_line(heads), _line(["---", "---", *["---:"] * (len(heads) - 2)])]
    for (name, question), found in by_question(rows).items():
        first = found.get("image") or next(iter(found.values()))
        scores = [score_text(found.get(condition)) for condition in conditions]
        lines.append(_line([name, kind_text(question, first), f"{first['n']:,}", *scores]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
