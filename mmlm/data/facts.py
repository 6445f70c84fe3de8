"""What a data recipe says about the set it names: licence, size, revision, and what is broken.

These words stand under `about:` in `data_recipes/sources/*.yaml`. They change nothing about what
is read; they are for people, for the model card, and for whoever must decide whether a set may
be used at all. A fact that was not read off the set's own card or paper is listed as unverified.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, model_validator

from mmlm.config import Config


class SourceFacts(Config):
    """Facts about one data set."""

    home: str | None = Field(default=None, min_length=1)
    """Where the set lives: the id on the Hub, or an address."""

    licence: str | None = Field(default=None, min_length=1)
    """The licence that its card names (SPDX where there is one), and what else binds."""

    rows: int | None = Field(default=None, ge=1)
    """The number of rows."""

    gigabytes: float | None = Field(default=None, gt=0)
    """How much is to be fetched, pictures included."""

    revision: str | None = None
    """The commit that the facts were read at."""

    paper: str | None = None
    """arXiv number of the paper."""

    fetch: str | None = None
    """What must be done by hand before the recipe can be used."""

    dead_links: str | None = None
    """Which pictures are known to be gone, and where a copy is."""

    unverified: tuple[str, ...] = ()
    """Which of these facts were not checked against the set's own card or paper; `shape` is the
    shape of its rows."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        known = {*type(self).model_fields, "shape"}
        if strange := sorted(set(self.unverified) - known):
            raise ValueError(f"unverified names {strange[0]!r}, which is no fact")
        return self

    def lines(self) -> list[str]:
        """Say it for people."""
        said = [
            f"{name:12}{value}{self._doubt(name)}"
            for name, value in (("home", self.home), ("licence", self.licence))
            if value is not None
        ]
        if self.rows is not None:
            said.append(f"rows        {self.rows:,}{self._doubt('rows')}")
        if self.gigabytes is not None:
            said.append(f"size        {self.gigabytes:,g} GB{self._doubt('gigabytes')}")
        for name in ("revision", "paper", "fetch", "dead_links"):
            if (value := getattr(self, name)) is not None:
                said.append(f"{name.replace('_', ' '):12}{value}{self._doubt(name)}")
        return said

    def _doubt(self, name: str) -> str:
        return " (unverified)" if name in self.unverified else ""


def facts_of(words: Any, *, origin: str) -> SourceFacts | None:
    """Return what a recipe says about its set, or None if it says nothing.

    Raises:
        ConfigError: if it says something that is no fact.
    """
    about = words.get("about") if isinstance(words, Mapping) else None
    if not isinstance(about, dict):
        return None
    return SourceFacts.from_dict(about, origin=f"{origin}: about")
