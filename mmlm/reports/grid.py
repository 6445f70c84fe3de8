"""A sweep on one page: a table of its cells, their losses over tokens, and their scores.

Rows are plain values: ``{name, tokens, learning, seconds, loss, validation_loss, scores, …}``, or
``{name, error}`` for a cell that could not be trained.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mmlm.reports.files import read_lines
from mmlm.reports.intervals import Line, Mark, intervals
from mmlm.reports.page import document
from mmlm.reports.svg import Curve, overlaid
from mmlm.reports.tables import score_text

Row = Mapping[str, Any]


def grid_cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return the heads and the cells of the table, the same for the terminal and the page."""
    questions = list(
        dict.fromkeys(
            (score["set"], score["question"])
            for row in rows
            for score in row.get("scores") or ()
            if score["condition"] == "image"
        )
    )
    held = any(row.get("validation_loss") is not None for row in rows)
    heads = ["cell", "learns", "tokens", "time", "MFU", "loss", *(["unseen rows"] * held)]
    heads += [f"{name} {question}" for name, question in questions]
    return heads, [_cells(row, held, questions) for row in rows]


def _cells(row: Row, held: bool, questions: Sequence[tuple[str, str]]) -> list[str]:
    if "tokens" not in row:
        return [str(row["name"]), *["–"] * (5 + held + len(questions))]
    scores = {
        (score["set"], score["question"]): score
        for score in row.get("scores") or ()
        if score["condition"] == "image"
    }
    mfu = row.get("mfu")
    cells = [
        str(row["name"]),
        f"{row['learning']:,}",
        f"{sum(row['tokens'].values()):,}",
        f"{row['seconds']:,.0f} s",
        "–" if mfu is None else f"{100 * mfu:.0f} %",
        _number(row.get("loss")),
    ]
    cells += [_number(row.get("validation_loss"))] * held
    return cells + [score_text(scores.get(question)) for question in questions]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def grid_table(rows: Sequence[Row], *, title: str) -> str:
    """Return the table as text for the terminal, and under it why cells failed."""
    heads, cells = grid_cells(rows)
    table = Table(title=title, title_justify="left")
    for number, head in enumerate(heads):
        table.add_column(head, justify="left" if number == 0 else "right")
    for line in cells:
        table.add_row(*line)
    console = Console(file=io.StringIO(), width=160, color_system=None, force_terminal=False)
    with console.capture() as caught:
        console.print(table, markup=False)
    failed = [f"{row['name']}: {row['error']}" for row in rows if row.get("error")]
    return caught.get() + "".join(f"{line}\n" for line in failed)


def grid_page(rows: Sequence[Row], folder: Path, *, title: str, lead: str) -> str:
    """Write the page.

    Args:
        rows: The cells.
        folder: Of the sweep; the logs of the cells are read from it.
        title: The headline.
        lead: A sentence under it.
    """
    heads, cells = grid_cells(rows)
    head = "".join(f"<th>{escape(one)}</th>" for one in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(one)}</td>" for one in line) + "</tr>" for line in cells
    )
    parts = [
        f"<header><h1>{escape(title)}</h1><p class='lead'>{escape(lead)}</p></header>",
        f'<div class="panel"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>",
    ]
    failed = [row for row in rows if row.get("error")]
    parts += [f"<p><b>{escape(row['name'])}</b> {escape(str(row['error']))}</p>" for row in failed]
    plot = loss_plot(rows, folder)
    if plot:
        parts.append(f'<h2>Loss over tokens</h2><div class="panel">{plot}</div>')
    lines = [
        Line(
            f"{row['name']} · {score['set']} {score['question']}",
            [Mark("image", score["score"], score["low"], score["high"])],
            score.get("chance"),
        )
        for row in rows
        for score in row.get("scores") or ()
        if score["condition"] == "image" and score["low"] >= 0 and score["high"] <= 1
    ]
    if lines:
        parts.append(f'<h2>Scores</h2><div class="panel">{intervals(lines)}</div>')
    return document("".join(parts), title=title)


def loss_plot(rows: Sequence[Row], folder: Path) -> str:
    """Draw the losses of all cells over the tokens that they have learnt from."""
    found: list[Curve] = []
    for row in rows:
        log = folder / str(row["name"]) / "log.jsonl"
        if not log.is_file():
            continue
        points: list[tuple[float, float]] = []
        tokens = 0.0
        for line in read_lines(log):
            tokens += float(line.get("tokens", 0))
            if isinstance(line.get("loss"), int | float):
                points.append((tokens, float(line["loss"])))
        found.append(Curve(str(row["name"]), points))
    return overlaid(found, title="Loss over tokens", unit="tokens")
