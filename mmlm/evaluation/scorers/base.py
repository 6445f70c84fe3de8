"""What a scorer promises, and the table of scorers.

A scorer reads one answer and marks it against its target; what it read is kept, so that a
report can show why an answer counted. An answer in which nothing can be read is wrong and is
counted as such: there is no random guess anywhere. To add a scorer: a function with worked
examples as doctests, and beside it a config registered in `scorers` that calls it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np

from mmlm.config import PartConfig
from mmlm.errors import ConfigError
from mmlm.evaluation.statistics import Floats, mean_of_shares
from mmlm.registry import Registry


@dataclass(frozen=True)
class Target:
    """What an answer is marked against.

    Args:
        references: Accepted answers; for VQA the answers of the ten annotators.
        choices: The options, as texts, where the question has them.
        vocabulary: Every name that is an answer somewhere in the benchmark, for scorers
            that tell one name from another.
        facts: The other columns of the row.
    """

    references: tuple[str, ...]
    choices: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


class Mark(NamedTuple):
    """The score of one answer, and what the scorer read in it; None if it could read nothing."""

    score: float
    reading: str | None


class Row(NamedTuple):
    """One marked item, as a metric sees it."""

    id: str
    image: str
    group: str
    mark: Mark
    target: Target


class ScorerConfig(PartConfig):
    """Base of all scorers.

    A metric is a function of sums, so that its interval can be had by drawing pictures:
    `tallies` says what the items of one picture add, `value` makes the score of the sums.
    """

    version: ClassVar[int] = 1
    """Raised when a rule changes, so that scores of two versions are never compared unawares."""

    metric: ClassVar[str] = "accuracy"
    """What the score is called in tables."""

    lower_is_better: ClassVar[bool] = False
    """Whether a smaller score is the better one, as where mistakes are counted."""

    is_share: ClassVar[bool] = True
    """Whether the score is the mean of marks between 0 and 1."""

    dialects: ClassVar[tuple[str, ...]] = ("mmlm",)
    """Whose rules there are; the first is the default."""

    fact_columns: ClassVar[tuple[str, ...]] = ()
    """Columns of the row, beside answers and choices, that the rules read."""

    file_fields: ClassVar[tuple[str, ...]] = ()
    """Settings that name files; a relative path is looked for beside the rows first."""

    dialect: str = ""
    """Whose rules: the name of a dialect of this scorer. Empty: its default."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse a dialect that the scorer does not speak."""
        if self.dialect and self.dialect not in self.dialects:
            raise ValueError(
                f"the scorer {self.use!r} speaks {', '.join(self.dialects)}, not {self.dialect!r}"
            )

    @property
    def spoken(self) -> str:
        """The dialect in use."""
        return self.dialect or self.dialects[0]

    @property
    def label(self) -> str:
        """Name, dialect and version, for logs."""
        dialect = f"/{self.spoken}" if len(self.dialects) > 1 else ""
        return f"{self.use}{dialect}@{self.version}"

    @abstractmethod
    def mark(self, answer: str, target: Target) -> Mark:
        """Mark one answer."""

    def fault(self, target: Target) -> str | None:
        """Say what a target lacks for this scorer, or None; asked before anything is answered."""
        return None if target.references else "it has no reference answer"

    def settle(self, answers: Sequence[str], rows: Sequence[Row]) -> list[Mark]:
        """Return the marks once every answer of a pass is known; by default those given."""
        del answers
        return [row.mark for row in rows]

    def ready(self) -> None:
        """Fail if something that marking needs is not on this machine; asked before any answer."""

    def chance(self, target: Target) -> float | None:
        """What guessing gives on a row; None where a guess is no option."""
        return 1 / len(target.choices) if target.choices else None

    def tallies(self, rows: Sequence[Row]) -> Floats:
        """Return what each row adds to the sums behind the metric: ``(rows, k)``."""
        return np.array([[row.mark.score, 1.0] for row in rows], dtype=np.float64)

    def value(self, totals: Floats) -> Floats:
        """Return the metric of sums ``(..., k)``."""
        return mean_of_shares(totals)

    def also(self, rows: Sequence[Row]) -> dict[str, float]:
        """Return further numbers that this benchmark usually reports."""
        del rows
        return {}


scorers: Registry[ScorerConfig] = Registry("scorer")
"""All scorers: ``scorer: choice``, or ``scorer: {use: vqa, dialect: llava}``."""


def read_scorer(value: Any, *, origin: str) -> ScorerConfig:
    """Read a scorer from its name or from ``{use: name, **settings}``.

    Raises:
        ConfigError: if there is none of that name, or a setting is wrong.
    """
    values = {"use": value} if isinstance(value, str) else value
    if not isinstance(values, dict):
        raise ConfigError(
            f"{origin} must be the name of a scorer, or {{use: name}} (got {value!r})."
        )
    return scorers.read(values, origin=origin)
