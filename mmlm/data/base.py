"""What every source of samples promises, and the table of sources.

An indexed source knows how many rows it has and gives any of them by number, so that the
order of a run is a pure function of its seed. To add one: a config class registered in
`sources`, whose `open` returns a `Source`. A source knows no tokenizer and no model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from pydantic import Field

from mmlm.config import PartConfig
from mmlm.data.schema import Sample
from mmlm.registry import Registry


class Source(ABC):
    """Rows by number. Memory must not grow with the rows beyond a few bytes each."""

    name: str

    @abstractmethod
    def __len__(self) -> int:
        """The number of rows, good and bad."""

    @abstractmethod
    def sample(self, row: int) -> Sample:
        """Return one sample.

        Raises:
            BadRowError: if the row cannot become a sample.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a short text that changes when the rows change; a resumed run compares it."""


class SourcePart(Source):
    """Every `of`-th row of a source, beginning with one.

    Args:
        whole: The source.
        number: The first row.
        of: How many parts there are.
    """

    def __init__(self, whole: Source, number: int, of: int) -> None:
        self.name = whole.name
        self._whole, self._number, self._of = whole, number, of

    def __len__(self) -> int:
        return len(range(self._number, len(self._whole), self._of))

    def sample(self, row: int) -> Sample:
        """Return a sample of the whole."""
        return self._whole.sample(row * self._of + self._number)

    def fingerprint(self) -> str:
        """Return what the whole is, and which part this is."""
        return f"{self._whole.fingerprint()}-{self._number}-{self._of}"


class SourceConfig(PartConfig):
    """Base of the configs of sources."""

    name: str | None = Field(default=None, min_length=1)
    """What the source is called in logs and counts; by default its file name."""

    def open(self, folder: Path) -> Source:
        """Open the source; `folder` is where relative paths in the config begin.

        Raises:
            DataError: if the source as a whole cannot be read.
        """
        raise NotImplementedError


sources: Registry[SourceConfig] = Registry("source", plural="data_sources")
"""All sources: ``{use: jsonl, path: my.jsonl}`` in a recipe."""
