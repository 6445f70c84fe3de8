"""Charts of real figures with questions whose answers are exact.

Bars, lying bars, lines and pies of what `tables` holds. A value is asked for only where the
chart writes it; everything else - the most, the least, how many lie above a line, which of two
is larger - can be read off the picture, because values that are compared differ by what the eye
can see.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from mmlm.data.builders import tables
from mmlm.data.builders.drawing import (
    COLOURS,
    INK,
    Row,
    letters,
    page,
    save,
    shortened,
    width_of,
    write_rows,
)
from mmlm.data.builders.npm import fetch

ABOUT = "Charts of real figures (bars, lines, pies), with exact answers."
VERSION = 1
FORMS = ("bars", "lying bars", "line", "pie")
_CLEAR = 0.04  # of the axis: what is nearer cannot be told apart by eye
_SCALED = ("bars", "line")
_LONGEST_NAME = 9  # letters that stand under a bar
_MOST = {"bars": 6, "lying bars": 8, "line": 11, "pie": 6}
_GREY = (205, 205, 210)


class Chart(NamedTuple):
    """What is drawn.

    Args:
        form: One of `FORMS`.
        title: What stands above it, unit included.
        labels: One for each value.
        values: What is drawn.
        written: Whether the values are written beside what is drawn.
        things: What the labels are, in the plural.
    """

    form: str
    title: str
    labels: tuple[str, ...]
    values: tuple[float, ...]
    written: bool
    things: str


class Asked(NamedTuple):
    """A question with its one right answer."""

    kind: str
    question: str
    answer: str


def number_of(value: float) -> str:
    """Write a value as charts do.

    >>> number_of(12.0), number_of(3.25)
    ('12', '3.2')
    """
    return f"{value:.1f}".removesuffix(".0")


def ask(chart: Chart, draw: random.Random) -> list[Asked]:
    """Ask all that this chart can answer, each kind once, in a random order."""
    pairs = sorted(zip(chart.values, chart.labels, strict=True))
    clear = _CLEAR * max(chart.values)
    one = chart.things.removesuffix("s") if chart.things != "countries" else "country"
    found: list[Asked] = []
    if pairs[-1][0] - pairs[-2][0] >= clear:
        found.append(Asked("most", f"Which {one} has the highest value?", pairs[-1][1]))
    if pairs[1][0] - pairs[0][0] >= clear:
        found.append(Asked("least", f"Which {one} has the lowest value?", pairs[0][1]))
    if chart.written:
        index = draw.randrange(len(chart.values))
        question = f"What is the value of {chart.labels[index]}?"
        found.append(Asked("value", question, number_of(chart.values[index])))
    apart = [(a, b) for a, b in combinations(pairs, 2) if b[0] - a[0] >= clear]
    if apart:
        both = list(draw.choice(apart))
        draw.shuffle(both)
        (x, first), (y, second) = both
        question = f"Is the value of {first} higher than that of {second}? Answer yes or no."
        found.append(Asked("compare", question, "yes" if x > y else "no"))
    gaps = [(a[0] + b[0]) / 2 for a, b in pairwise(pairs) if b[0] - a[0] >= 2 * clear]
    if gaps and (chart.written or chart.form in _SCALED):
        limit = float(number_of(draw.choice(gaps)))
        count = sum(value > limit for value in chart.values)
        if all(abs(value - limit) >= clear / 2 for value in chart.values):
            question = f"How many {chart.things} have a value above {number_of(limit)}?"
            found.append(Asked("above", question, str(count)))
    found.append(Asked("number", f"How many {chart.things} are shown?", str(len(chart.values))))
    found.append(Asked("title", "What is the title of the chart?", chart.title))
    draw.shuffle(found)
    return found


def draw_chart(chart: Chart, draw: random.Random, *, side_px: int = 336) -> Image.Image:
    """Draw a chart into a square."""
    image, pen = page(side_px, side_px)
    size = max(9, side_px // 26)
    pen.text((size, size * 0.6), chart.title, fill=INK, font=letters(_fit(chart.title, side_px)))
    box = (size * 1.0, size * 2.6, side_px - size * 1.0, side_px - size * 1.0)
    colours = draw.sample([COLOURS[name] for name in COLOURS if name != "black"], 8)
    {"bars": _bars, "lying bars": _lying, "line": _line, "pie": _pie}[chart.form](
        pen, chart, box, colours, size
    )
    return image


def _fit(title: str, side_px: int) -> int:
    """Return the largest size at which a title fits into a picture."""
    size = max(9, side_px // 20)
    while size > 7 and width_of(title, size) > side_px - 2 * size:
        size -= 1
    return size


def _scale(pen: Any, chart: Chart, box: tuple[float, ...], size: int) -> tuple[float, float]:
    """Draw a scale with lines to the right of it; return its top value and its width."""
    left, top, right, bottom = box
    step = _round_step(max(chart.values) / 4)
    steps = int(max(chart.values) / step) + 1
    width = max(width_of(number_of(step * n), size) for n in range(steps + 1)) + size * 0.6
    for n in range(steps + 1):
        y = bottom - (bottom - top) * n / steps
        text = number_of(step * n)
        pen.line((left + width, y, right, y), fill=_GREY)
        place = (left + width - size * 0.4 - width_of(text, size), y - size * 0.6)
        pen.text(place, text, fill=INK, font=letters(size))
    return step * steps, width


def _round_step(least: float) -> float:
    """Return the next of 1, 2, 5, 10, 20 … above a step.

    >>> _round_step(3.1), _round_step(0.12), _round_step(60)
    (5.0, 0.2, 100.0)
    """
    power = 10.0 ** (len(str(int(least))) - 1) if least >= 1 else 0.1
    return next(float(round(f * power, 2)) for f in (1, 2, 5, 10, 20) if f * power >= least)


def _bars(pen: Any, chart: Chart, box: tuple[float, ...], colours: list[Any], size: int) -> None:
    left, top, right, bottom = box
    bottom -= size * 1.6
    most, width = _scale(pen, chart, (left, top + size, right, bottom), size)
    room = (right - left - width) / len(chart.values)
    for index, (label, value) in enumerate(zip(chart.labels, chart.values, strict=True)):
        x = left + width + room * index
        y = bottom - (bottom - top - size) * value / most
        pen.rectangle((x + room * 0.15, y, x + room * 0.85, bottom), fill=colours[index % 8])
        small = max(8, size - 2) if len(chart.values) > 4 else size
        _middle(pen, shortened(label, small, room * 0.98), x + room / 2, bottom + 3, small)
        if chart.written:
            _middle(pen, number_of(value), x + room / 2, y - size * 1.2, small)


def _lying(pen: Any, chart: Chart, box: tuple[float, ...], colours: list[Any], size: int) -> None:
    left, top, right, bottom = box
    names = max(width_of(label, size) for label in chart.labels)
    names = min(names, (right - left) * 0.4)
    values = max(width_of(number_of(value), size) for value in chart.values) + size * 0.6
    room = (bottom - top) / len(chart.values)
    start = left + names + size * 0.5
    for index, (label, value) in enumerate(zip(chart.labels, chart.values, strict=True)):
        y = top + room * index
        end = start + (right - values - start) * value / max(chart.values)
        pen.text((left, y + room / 2 - size * 0.6), shortened(label, size, names), fill=INK,
                 font=letters(size))  # fmt: skip
        pen.rectangle((start, y + room * 0.15, end, y + room * 0.85), fill=colours[0])
        if chart.written:
            place = (end + size * 0.3, y + room / 2 - size * 0.6)
            pen.text(place, number_of(value), fill=INK, font=letters(size))


def _line(pen: Any, chart: Chart, box: tuple[float, ...], colours: list[Any], size: int) -> None:
    left, top, right, bottom = box
    bottom -= size * 1.6
    most, width = _scale(pen, chart, (left, top + size, right, bottom), size)
    room = (right - left - width) / len(chart.values)
    points = [
        (left + width + room * (index + 0.5), bottom - (bottom - top - size) * value / most)
        for index, value in enumerate(chart.values)
    ]
    pen.line(points, fill=colours[0], width=max(2, size // 4), joint="curve")
    small = max(8, size - 3)
    for (x, y), label, value in zip(points, chart.labels, chart.values, strict=True):
        dot = size * 0.3
        pen.ellipse((x - dot, y - dot, x + dot, y + dot), fill=colours[0])
        _middle(pen, label, x, bottom + 3, small)
        if chart.written:
            _middle(pen, number_of(value), x, y - small * 1.6, small)


def _pie(pen: Any, chart: Chart, box: tuple[float, ...], colours: list[Any], size: int) -> None:
    left, top, right, bottom = box
    side = min((right - left) * 0.56, bottom - top)
    disc = (left, top + (bottom - top - side) / 2, left + side, top + (bottom - top + side) / 2)
    total, angle = sum(chart.values), -90.0
    for index, (label, value) in enumerate(zip(chart.labels, chart.values, strict=True)):
        end = angle + 360 * value / total
        pen.pieslice(disc, angle, end, fill=colours[index], outline=(255, 255, 255))
        angle = end
        y = top + size * 1.7 * index + size
        x = left + side + size
        pen.rectangle((x, y, x + size * 0.8, y + size * 0.8), fill=colours[index])
        text = f"{label} {number_of(value)}" if chart.written else label
        place = (x + size * 1.2, y - size * 0.2)
        pen.text(place, shortened(text, size, right - place[0]), fill=INK, font=letters(size))


def _middle(pen: Any, text: str, x: float, y: float, size: int) -> None:
    pen.text((x - width_of(text, size) / 2, y), text, fill=INK, font=letters(size))


@dataclass(frozen=True)
class Settings:
    """What decides how the data set comes out.

    Args:
        seed: Begins every choice.
        side_px: The side of the pictures.
        charts: Charts to learn from.
        test_charts: Charts of countries that training never shows.
        questions: Questions asked of one chart.
    """

    seed: int = 0
    side_px: int = 336
    charts: int = 2000
    test_charts: int = 200
    questions: int = 4


def key() -> str:
    """Return a short text that changes when the data set would."""
    text = json.dumps([VERSION, asdict(Settings()), tables.VEGA.sha512])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def make(
    folder: Path,
    say: Callable[[str], None],
    *,
    settings: Settings | None = None,
    get: tables.Fetch = fetch,
) -> dict[str, Any]:
    """Fill an empty folder with `train` and `test`, and return what the report says."""
    settings = settings or Settings()
    figures = tables.read_gapminder(get([tables.VEGA])[tables.VEGA.name])
    train, test = tables.split_names(list(figures), settings.seed)
    counts: dict[str, int] = {}
    wanted = (("train", train, settings.charts), ("test", test, settings.test_charts))
    for name, countries, count in wanted:
        say(f"drawing {count:,} charts of {len(countries)} countries for {name}")
        counts[name] = write_rows(
            folder, name, _rows(folder, name, figures, countries, count, settings)
        )
    return {
        "about": ABOUT,
        "settings": asdict(settings),
        "rows": counts,
        "sources": [_source(tables.VEGA)],
    }


def _source(package: Any) -> dict[str, str]:
    return {"package": str(package), "licence": package.licence, "by": package.author}


def _rows(
    folder: Path,
    name: str,
    figures: dict[str, dict[int, dict[str, float]]],
    countries: list[str],
    count: int,
    settings: Settings,
) -> Iterator[Row]:
    for number in range(count):
        draw = random.Random(f"chart {VERSION} {settings.seed} {name} {number}")
        chart = make_chart(figures, countries, FORMS[number % len(FORMS)], draw)
        image = f"pictures/{name}/{number:05d}.png"
        save(draw_chart(chart, draw, side_px=settings.side_px), folder / image)
        asked = ask(chart, draw)[: settings.questions]
        yield {
            "id": f"{name}-{number}",
            "image": image,
            "conversations": [
                turn
                for one in asked
                for turn in (
                    {"from": "human", "value": one.question},
                    {"from": "gpt", "value": one.answer},
                )
            ],
            "form": chart.form,
            "kinds": [one.kind for one in asked],
        }


def make_chart(
    figures: dict[str, dict[int, dict[str, float]]],
    countries: list[str],
    form: str,
    draw: random.Random,
) -> Chart:
    """Choose what one chart shows: several countries in a year, or the years of one."""
    # Shares of a whole are sums of people; years and children have none.
    measure = "pop" if form == "pie" else draw.choice(list(tables.MEASURES))
    title, unit, _ = tables.MEASURES[measure]
    written = draw.random() < 0.6
    if form == "line":
        country = draw.choice(countries)
        years = sorted(figures[country])[-_MOST[form] :]
        values = tuple(figures[country][year][measure] for year in years)
        labels = tuple(map(str, years))
        return Chart(form, f"{title} of {country} ({unit})", labels, values, written, "years")
    fit = [c for c in countries if form != "bars" or len(c) <= _LONGEST_NAME]
    names = draw.sample(fit, draw.randint(3, min(_MOST[form], len(fit))))
    year = draw.choice(sorted(figures[names[0]]))
    values = tuple(figures[name][year][measure] for name in names)
    return Chart(form, f"{title}, {year} ({unit})", tuple(names), values, written, "countries")
