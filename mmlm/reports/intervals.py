"""Scores between 0 and 1 with their intervals, as HTML that a page can make narrow or wide.

One row for each kind of question, one line in it for each condition; every condition has a
shape of its own beside its colour (see `svg`), and the numbers stand in the tooltip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

from mmlm.reports.svg import legend_mark


class Mark(NamedTuple):
    """One score of an interval plot."""

    condition: str
    score: float
    low: float
    high: float


@dataclass(frozen=True)
class Line:
    """One question of an interval plot: a name, its marks, and what guessing gives."""

    name: str
    marks: Sequence[Mark]
    chance: float | None = None


def intervals(lines: Sequence[Line]) -> str:
    """Draw the questions one under another, over one axis from 0 to 100 percent."""
    ticks = "".join(f'<span style="left:{tick}%">{tick} %</span>' for tick in range(0, 101, 25))
    return (
        f'<div class="intervals"><div class="axis">{ticks}</div>{"".join(map(_line, lines))}</div>'
    )


def _line(line: Line) -> str:
    chance = ""
    if line.chance is not None:
        chance = f'<i class="chance" style="left:{_percent(line.chance)}"></i>'
    marks = "".join(map(_mark, line.marks))
    return f'<div class="label">{escape(line.name)}</div><div class="track">{chance}{marks}</div>'


def _mark(mark: Mark) -> str:
    title = f"{mark.condition}: {mark.score:.1%} ({mark.low:.1%} to {mark.high:.1%})"
    return (
        f'<div class="row c-{mark.condition}" title="{title}">'
        f'<i class="whisker" style="left:{_percent(mark.low)};'
        f'width:{_percent(max(0.0, mark.high - mark.low))}"></i>'
        f'<b style="left:{_percent(mark.score)}">{legend_mark(mark.condition)}</b></div>'
    )


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"
