"""Plots as small inline SVG: the marks of conditions, and curves of a training run.

Colours are CSS variables of the page (see `page.css`), so that one plot serves light and
dark. Every mark has a shape of its own beside its colour, and a `<title>` with the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

Scale = Callable[[float], float]

SHAPES = {
    "image": "circle",
    "blind": "square",
    "shuffled": "diamond",
    "permuted": "triangle",
    "nearest_neighbour": "cross",
}


def shape(condition: str, x: float, y: float, size: float = 5.0) -> str:
    """Draw the mark of a condition around a point."""
    kind = SHAPES.get(condition, "circle")
    if kind == "circle":
        return f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="{size}"/>'
    if kind == "square":
        corner = size * 0.9
        return (
            f'<rect class="mark" x="{x - corner:.1f}" y="{y - corner:.1f}" '
            f'width="{2 * corner:.1f}" height="{2 * corner:.1f}"/>'
        )
    if kind == "cross":
        d = size * 0.9
        return (
            f'<path class="mark stroke" d="M{x - d:.1f} {y - d:.1f}L{x + d:.1f} {y + d:.1f}'
            f'M{x - d:.1f} {y + d:.1f}L{x + d:.1f} {y - d:.1f}"/>'
        )
    d = size * 1.25
    points = [(x, y - d), (x + d, y), (x, y + d), (x - d, y)]
    if kind == "triangle":
        points = [(x, y - d), (x + d, y + 0.8 * d), (x - d, y + 0.8 * d)]
    joined = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    return f'<polygon class="mark" points="{joined}"/>'


def legend_mark(condition: str) -> str:
    """Draw a condition's mark alone, for a legend or a table."""
    return (
        f'<svg class="legend-mark" viewBox="0 0 16 16" width="16" height="16" aria-hidden="true">'
        f'<g class="c-{condition}">{shape(condition, 8, 8, 5)}</g></svg>'
    )


@dataclass(frozen=True)
class Curve:
    """The steps of one stage: a name, and ``(step, value)`` in order."""

    name: str
    points: Sequence[tuple[float, float]]


def curves(stages: Sequence[Curve], *, title: str) -> str:
    """Draw a value over steps, the stages one after another; thin as measured, thick smoothed."""
    stages = [stage for stage in stages if stage.points]
    values = [value for stage in stages for _, value in stage.points if math.isfinite(value)]
    if not values:
        return ""
    width, height, left, right, top, bottom = 720, 300, 64, 12, 34, 34
    low, high = _range(values)
    steps = sum(len(stage.points) for stage in stages)
    parts = [_open(width, height, title, "curves")]

    def x(place: float) -> float:
        return left + place / max(steps - 1, 1) * (width - left - right)

    def y(value: float) -> float:
        share = (min(max(value, low), high) - low) / (high - low)
        return height - bottom - share * (height - top - bottom)

    for tick in _ticks(low, high):
        parts.append(
            f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y(tick):.1f}" '
            f'y2="{y(tick):.1f}"/><text class="tick" x="{left - 8}" y="{y(tick) + 4:.1f}" '
            f'text-anchor="end">{tick:g}</text>'
        )
    start = 0
    for number, stage in enumerate(stages):
        parts.append(_stage(stage, number, start, x, y, top, height - bottom))
        start += len(stage.points)
    parts.append(
        f'<text class="tick" x="{width - right}" y="{height - 10}" text-anchor="end">steps</text>'
    )
    return "".join(parts) + "</svg>"


_DASHES = ("", "7 4", "2 3", "9 3 2 3")


def overlaid(curves: Sequence[Curve], *, title: str, unit: str) -> str:
    """Draw smoothed values of several runs over one axis, told apart by colour and by dashes."""
    curves = [curve for curve in curves if curve.points]
    values = [value for curve in curves for _, value in curve.points if math.isfinite(value)]
    if not values:
        return ""
    width, left, right, top, floor = 720, 64, 12, 14, 286
    low, high = _range(values)
    most = max(place for curve in curves for place, _ in curve.points) or 1.0
    parts = [_open(width, 330 + 20 * len(curves), title, "curves")]

    def y(value: float) -> float:
        return floor - (min(max(value, low), high) - low) / (high - low) * (floor - top)

    for tick in _ticks(low, high):
        parts.append(
            f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y(tick):.1f}" '
            f'y2="{y(tick):.1f}"/><text class="tick" x="{left - 8}" y="{y(tick) + 4:.1f}" '
            f'text-anchor="end">{tick:g}</text>'
        )
    parts.append(
        f'<text class="tick" x="{width - right}" y="{floor + 22}" text-anchor="end">'
        f"{most:,.0f} {escape(unit)}</text>"
    )
    for number, curve in enumerate(curves):
        means = smoothed([value for _, value in curve.points])
        line = [
            (left + place / most * (width - left - right), y(mean) if math.isfinite(mean) else mean)
            for (place, _), mean in zip(curve.points, means, strict=True)
        ]
        dashes = f' stroke-dasharray="{_DASHES[number // 4 % len(_DASHES)]}"'
        below = floor + 44 + 20 * number
        parts.append(
            f'<g class="stage s{number % 4}"><path class="smooth" d="{_path(line)}"{dashes}/>'
            f'<path class="smooth" d="M{left} {below - 4}h28"{dashes}/>'
            f'<text class="label" x="{left + 38}" y="{below}">{escape(curve.name)}</text>'
            f"<title>{escape(curve.name)}: {means[-1]:.4g}</title></g>"
        )
    return "".join(parts) + "</svg>"


def _stage(stage: Curve, number: int, start: int, x: Scale, y: Scale, top: int, floor: int) -> str:
    count = len(stage.points)
    left, right = x(start), x(start + count - 1)
    raw = [(x(start + n), y(value)) for n, (_, value) in enumerate(stage.points)]
    smooth = [
        (x(start + n), y(value))
        for n, value in enumerate(smoothed([value for _, value in stage.points]))
    ]
    last = stage.points[-1]
    return (
        f'<g class="stage s{number % 4}">'
        f'<rect class="stage-area" x="{left:.1f}" y="{top}" width="{max(right - left, 1):.1f}" '
        f'height="{floor - top}"/>'
        f'<text class="label" x="{left + 6:.1f}" y="{top - 10}">{escape(stage.name)}</text>'
        f'<path class="raw" d="{_path(raw)}"/><path class="smooth" d="{_path(smooth)}"/>'
        f'<text class="tick" x="{left + 6:.1f}" y="{floor + 24}">from step {stage.points[0][0]:g}'
        f"</text><title>{escape(stage.name)}: {last[1]:.4g} at step {last[0]:g}</title></g>"
    )


def smoothed(values: Sequence[float], *, keep: float = 0.9) -> list[float]:
    """Return the running mean of values, without the bias of its beginning.

    >>> [round(value, 3) for value in smoothed([1.0, 1.0, 3.0])]
    [1.0, 1.0, 1.738]
    """
    mean, weight = 0.0, 0.0
    found: list[float] = []
    for value in values:
        if math.isfinite(value):
            mean = keep * mean + (1 - keep) * value
            weight = keep * weight + (1 - keep)
        found.append(mean / weight if weight else float("nan"))
    return found


def _path(points: Sequence[tuple[float, float]]) -> str:
    """Draw a line through at most 400 points; gaps where a value is no number."""
    step = max(1, len(points) // 400)
    kept = [*points[::step], *([] if (len(points) - 1) % step == 0 else [points[-1]])]
    text, pen = "", "M"
    for x, y in kept:
        if not math.isfinite(y):
            pen = "M"
            continue
        text += f"{pen}{x:.1f} {y:.1f}"
        pen = "L"
    return text


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Return a range that a few outliers at the beginning do not stretch."""
    ordered = sorted(values)
    high = ordered[min(len(ordered) - 1, math.ceil(0.995 * len(ordered)))]
    low = min(0.0, ordered[0])
    return (low, high) if high > low else (low, low + 1.0)


def _ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 4
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough)
    first = math.ceil(low / step)
    return [round(step * n, 10) for n in range(first, math.floor(high / step) + 1)]


def _open(width: int, height: float, title: str, kind: str) -> str:
    return (
        f'<svg class="plot {kind}" viewBox="0 0 {width} {height:.0f}" role="img" '
        f'xmlns="http://www.w3.org/2000/svg"><title>{escape(title)}</title>'
    )
