"""Real tables out of npm packages, for pictures that show numbers: charts and documents.

    gapminder    life expectancy, children and people of 62 countries, 1955 to 2005
    countries    capital, region, area, languages, currency and neighbours of countries

Both packages are fetched at a pinned version and checked; see `npm`. The names that go into
the test are chosen here, once, so that no chart and no sheet of the test shows a country that
training shows.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmlm.data.builders.npm import NpmPackage, read_files

VEGA = NpmPackage(
    "vega-datasets",
    "3.2.1",
    "lTSwZA6yq6qSU2YZm+6bqILiIvTPPxn4itir7jPGFmHIdPvUfQ9pCzzcrklYywMJgLUbaIeSkZQdiJd6wBxPug==",
    "BSD-3-Clause",
    "the Vega project; figures by Gapminder (CC-BY-4.0)",
)
COUNTRIES = NpmPackage(
    "world-countries",
    "5.1.0",
    "CXR6EBvTbArDlDDIWU3gfKb7Qk0ck2WNZ234b/A0vuecPIzfzxzH+O6Ejnvg1sT8XuiZjVlzOH0h08ZtaO7g0w==",
    "ODbL-1.0",
    "Mohammed Le Doze and others",
)
PACKAGES = (VEGA, COUNTRIES)
Fetch = Callable[[Sequence[NpmPackage]], dict[str, Path]]
_TEST_SHARE = 0.15

MEASURES: dict[str, tuple[str, str, float]] = {
    "life_expect": ("Life expectancy", "years", 1.0),
    "fertility": ("Children per woman", "children", 1.0),
    "pop": ("Population", "million people", 1e-6),
}
"""What gapminder measures: a title, a unit, and by what the number is multiplied."""


@dataclass(frozen=True)
class Country:
    """What a sheet says of one country."""

    name: str
    capital: str
    region: str
    area_km2: int
    languages: tuple[str, ...]
    currency: str
    neighbours: tuple[str, ...]


def read_gapminder(archive: Path) -> dict[str, dict[int, dict[str, float]]]:
    """Return country, year and measure of every figure, in the units of `MEASURES`."""
    name = "data/gapminder.json"
    rows: list[dict[str, Any]] = json.loads(read_files(archive, [name])[name])
    found: dict[str, dict[int, dict[str, float]]] = {}
    for row in rows:
        figures = {key: round(row[key] * scale, 1) for key, (_, _, scale) in MEASURES.items()}
        found.setdefault(row["country"], {})[int(row["year"])] = figures
    return found


def read_countries(archive: Path) -> list[Country]:
    """Return the independent countries that have all that a sheet shows."""
    name = "dist/countries.json"
    rows: list[dict[str, Any]] = json.loads(read_files(archive, [name])[name])
    names = {row["cca3"]: row["name"]["common"] for row in rows}
    found = [
        Country(
            row["name"]["common"],
            row["capital"][0],
            row["subregion"] or row["region"],
            int(row["area"]),
            tuple(sorted(row["languages"].values())),
            sorted(money["name"] for money in row["currencies"].values())[0],
            tuple(sorted(names[code] for code in row["borders"])),
        )
        for row in rows
        if row["independent"] and row["capital"] and row["languages"] and row["currencies"]
        and row["area"] >= 1
    ]  # fmt: skip
    # The typeface that Pillow carries writes plain Latin letters alone.
    return sorted((one for one in found if _is_plain(one)), key=lambda one: one.name)


def _is_plain(country: Country) -> bool:
    text = " ".join([country.name, country.capital, country.currency, *country.languages])
    return text.isascii()


def split_names(names: Sequence[str], seed: int) -> tuple[list[str], list[str]]:
    """Part names into those of training and those of the test."""
    ordered = sorted(names)
    test = set(random.Random(f"tables {seed}").sample(ordered, round(len(ordered) * _TEST_SHARE)))
    return [name for name in ordered if name not in test], sorted(test)
