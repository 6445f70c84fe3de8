"""Sheets of paper with real facts, and questions whose answers stand on them.

Three layouts - a form, a table, a letter - over the facts of `tables`. Each sheet carries a
reference number, a date and an office that are made up, so that there is always something that
nobody can know without reading. Answers are exact: what is printed, letter by letter.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mmlm.data.builders import tables
from mmlm.data.builders.drawing import (
    INK,
    PAPERS,
    Row,
    letters,
    page,
    save,
    shortened,
    width_of,
    wrapped,
    write_rows,
)
from mmlm.data.builders.npm import fetch
from mmlm.data.builders.tables import Country

ABOUT = "Sheets with facts about countries (forms, tables, letters), with exact answers."
VERSION = 1
LAYOUTS = ("form", "table", "letter")
_OFFICES = ("Map Room", "Atlas Desk", "Border Office", "Trade Bureau", "Field Station", "Archive")
_MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September",
           "October", "November", "December")  # fmt: skip
_LINE_GREY = (190, 190, 195)


@dataclass(frozen=True)
class Sheet:
    """One sheet.

    Args:
        layout: One of `LAYOUTS`.
        image: The picture.
        text: All that is printed, line by line.
        asked: Questions with their answers.
    """

    layout: str
    image: Image.Image
    text: str
    asked: tuple[tuple[str, str], ...]


class _Paper:
    """A sheet that is being written, from the top down."""

    def __init__(self, side_px: int, draw: random.Random) -> None:
        self.side_px = side_px
        self.image, self.pen = page(side_px, side_px, draw.choice(PAPERS))
        self.size = side_px // 28
        self.margin = side_px // 16
        self.y = float(self.margin)
        self.lines: list[str] = []

    @property
    def room_px(self) -> float:
        return self.side_px - 2 * self.margin

    def write(self, text: str, *, larger: float = 1.0, gap: float = 1.5) -> None:
        size = round(self.size * larger)
        for line in wrapped(text, size, self.room_px):
            self.pen.text((self.margin, self.y), line, fill=INK, font=letters(size))
            self.y += size * gap
            self.lines.append(line)

    def cells(self, texts: list[str], columns: list[float], *, ruled: bool = True) -> list[str]:
        """Write texts side by side; return them as they fit."""
        if ruled:
            y = self.y - self.size * 0.35
            self.pen.line((self.margin, y, self.side_px - self.margin, y), fill=_LINE_GREY)
        edges = [*columns, 1.0]
        fitted: list[str] = []
        for text, begin, end in zip(texts, edges, edges[1:], strict=False):
            room = (end - begin) * self.room_px - self.size * 0.5
            fitted.append(shortened(text, self.size, room))
            place = (self.margin + begin * self.room_px, self.y)
            self.pen.text(place, fitted[-1], fill=INK, font=letters(self.size))
        self.y += self.size * 1.9
        self.lines.append("  ".join(fitted))
        return fitted


def make_sheet(
    countries: list[Country], layout: str, draw: random.Random, *, side_px: int = 448
) -> Sheet:
    """Write one sheet about some of the countries."""
    paper = _Paper(side_px, draw)
    made_up = {
        "reference": f"{draw.choice('ABCDEFGHKLMNPRSTVWXZ')}{draw.randrange(1000, 10000)}",
        "date": f"{draw.randint(1, 28)} {draw.choice(_MONTHS)} {draw.randint(1980, 2025)}",
        "office": draw.choice(_OFFICES),
    }
    asked = [
        ("What is the reference number?", made_up["reference"]),
        ("Which date stands on the sheet?", made_up["date"]),
        ("Which office wrote the sheet?", made_up["office"]),
    ]
    writers = {"form": _form, "table": _table, "letter": _letter}
    asked += writers[layout](paper, countries, made_up, draw)
    draw.shuffle(asked)
    return Sheet(layout, paper.image, "\n".join(paper.lines), tuple(asked))


def _area(country: Country) -> str:
    return f"{country.area_km2:,} sq km"


def _form(
    paper: _Paper, countries: list[Country], made_up: dict[str, str], draw: random.Random
) -> list[tuple[str, str]]:
    country = draw.choice(countries)
    facts = {
        "Capital": country.capital,
        "Region": country.region,
        "Area": _area(country),
        "Currency": country.currency,
        "Languages": ", ".join(country.languages[:3]),
        "Neighbours": str(len(country.neighbours)),
    }
    head = {"Reference": made_up["reference"], "Date": made_up["date"], "Office": made_up["office"]}
    paper.write(country.name, larger=1.6, gap=1.7)
    rows = [*head.items(), *draw.sample(list(facts.items()), 5)]
    asked: list[tuple[str, str]] = []
    for name, value in rows:
        _, shown = paper.cells([name, value], [0.0, 0.36])
        if name in facts and shown == value:
            asked.append((f'What stands beside "{name}"?', value))
    return [*asked, ("What is the heading of the sheet?", country.name)]


def _table(
    paper: _Paper, countries: list[Country], made_up: dict[str, str], draw: random.Random
) -> list[tuple[str, str]]:
    short = [c for c in countries if width_of(c.name, paper.size) < paper.room_px * 0.3]
    chosen = draw.sample(short, min(len(short), draw.randint(4, 8)))
    paper.write(f"Areas and capitals, no. {made_up['reference']}", larger=1.3, gap=1.8)
    paper.write(f"{made_up['office']}, {made_up['date']}", gap=2.0)
    paper.cells(["Country", "Capital", "Area"], [0.0, 0.34, 0.68])
    asked: list[tuple[str, str]] = []
    for country in chosen:
        row = [country.name, country.capital, _area(country)]
        if paper.cells(row, [0.0, 0.34, 0.68]) == row:
            asked.append((f"Which area does the table give for {country.name}?", row[2]))
            asked.append((f"Which capital stands in the row of {country.name}?", row[1]))
    ordered = sorted(chosen, key=lambda country: country.area_km2)
    asked = draw.sample(asked, min(2, len(asked)))
    asked.append(("Which country of the table has the largest area?", ordered[-1].name))
    asked.append(("How many countries does the table list?", str(len(chosen))))
    asked.append(("Which country stands in the first row?", chosen[0].name))
    return asked


def _letter(
    paper: _Paper, countries: list[Country], made_up: dict[str, str], draw: random.Random
) -> list[tuple[str, str]]:
    one, other = draw.sample(countries, 2)
    days = draw.randint(2, 19)
    paper.write(made_up["office"], larger=1.3)
    paper.write(made_up["date"], gap=2.6)
    paper.write(f"Reference: {made_up['reference']}", gap=2.2)
    paper.write(
        f"We were asked about {one.name} and {other.name}. The capital of {one.name} is "
        f"{one.capital}, and one pays there in {one.currency}. {other.name} covers "
        f"{_area(other)}; its capital is {other.capital}.",
    )
    paper.y += paper.size
    paper.write(f"We will write again within {days} days.", gap=2.4)
    return [
        ("Within how many days will they write again?", str(days)),
        (f"Which area does the letter give for {other.name}?", _area(other)),
        ("About which two countries were they asked?", f"{one.name} and {other.name}"),
        (f"What is the currency of {one.name}, as the letter says?", one.currency),
    ]


@dataclass(frozen=True)
class Settings:
    """What decides how the data set comes out.

    Args:
        seed: Begins every choice.
        side_px: The side of the pictures.
        sheets: Sheets to learn from.
        test_sheets: Sheets about countries that training never shows.
        questions: Questions asked of one sheet.
    """

    seed: int = 0
    side_px: int = 448
    sheets: int = 2000
    test_sheets: int = 200
    questions: int = 4


def key() -> str:
    """Return a short text that changes when the data set would."""
    text = json.dumps([VERSION, asdict(Settings()), tables.COUNTRIES.sha512])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def make(
    folder: Path,
    say: Callable[[str], None],
    *,
    settings: Settings | None = None,
    get: tables.Fetch = fetch,
) -> dict[str, Any]:
    """Fill a folder with `train`, `test` and `read` (the whole text), and return the report."""
    settings = settings or Settings()
    package = tables.COUNTRIES
    countries = tables.read_countries(get([package])[package.name])
    train, test = tables.split_names([country.name for country in countries], settings.seed)
    counts: dict[str, int] = {}
    for name, names, count in (
        ("train", train, settings.sheets),
        ("test", test, settings.test_sheets),
    ):
        say(f"writing {count:,} sheets about {len(names)} countries for {name}")
        shown = [country for country in countries if country.name in set(names)]
        rows = list(_rows(folder, name, shown, count, settings))
        counts[name] = write_rows(folder, name, (asked for asked, _ in rows))
        if name == "train":
            counts["read"] = write_rows(folder, "read", (read for _, read in rows))
    source = {"package": str(package), "licence": package.licence, "by": package.author}
    return {"about": ABOUT, "settings": asdict(settings), "rows": counts, "sources": [source]}


def _rows(
    folder: Path, name: str, countries: list[Country], count: int, settings: Settings
) -> Iterator[tuple[Row, Row]]:
    for number in range(count):
        draw = random.Random(f"sheet {VERSION} {settings.seed} {name} {number}")
        layout = LAYOUTS[number % len(LAYOUTS)]
        sheet = make_sheet(countries, layout, draw, side_px=settings.side_px)
        image = f"pictures/{name}/{number:05d}.png"
        save(sheet.image, folder / image)
        head = {"id": f"{name}-{number}", "image": image}
        turns = [
            turn
            for question, answer in sheet.asked[: settings.questions]
            for turn in ({"from": "human", "value": question}, {"from": "gpt", "value": answer})
        ]
        read = {**head, "question": "Read the sheet aloud.", "answer": sheet.text}
        yield {**head, "conversations": turns, "layout": layout}, {**read, "layout": layout}
