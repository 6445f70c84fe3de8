"""Samples share rows, so that no computing is spent on padding.

Best fit over a number of open rows: a sample goes where it leaves the least room. Two
budgets, tokens and image tiles; a sample is never cut. The packer sees lengths only, and
which samples wait in which open row is its whole state, so a run goes on exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydantic import Field

from mmlm.config import Config


class PackingConfig(Config):
    """How samples share a row.

    Samples never see one another: position ids restart and attention is blocked at
    every sample border. A sample that is longer than a row is dropped and counted.
    """

    row_tokens: int = Field(default=4096, ge=16)
    """Length of a row in tokens, image tokens included."""

    open_rows: int = Field(default=32, ge=1)
    """Rows kept open at once. More rows waste less space and hold more samples back."""

    max_tiles: int = Field(default=256, ge=1)
    """Most image tiles in a row. This bounds the encoder's memory; the text is bounded already."""

    wait_samples: int = Field(default=2048, ge=1)
    """A row is closed after this many later samples, full or not. Counted, not timed: a clock
    would break exact resume."""


class Packable(Protocol):
    """What the packer needs to know of a sample."""

    position: int
    num_tokens: int
    num_tiles: int


@dataclass
class Row:
    """Samples that share one row.

    Args:
        samples: In the order in which they were put in.
        opened_at: How many samples the packer had seen when the row was opened.
    """

    samples: list[Any] = field(default_factory=list)
    num_tokens: int = 0
    num_tiles: int = 0
    opened_at: int = 0

    def add(self, sample: Packable) -> None:
        """Put a sample at the end."""
        self.samples.append(sample)
        self.num_tokens += sample.num_tokens
        self.num_tiles += sample.num_tiles


class Packer:
    """Fills rows; see the module's docstring."""

    def __init__(self, config: PackingConfig) -> None:
        self.config = config
        self._rows: list[Row] = []
        self._seen = 0

    def add(self, sample: Packable) -> list[Row]:
        """Take one sample that fits an empty row; return the rows that are closed by it."""
        self._seen += 1
        best: Row | None = None
        for row in self._rows:
            fits = (
                row.num_tokens + sample.num_tokens <= self.config.row_tokens
                and row.num_tiles + sample.num_tiles <= self.config.max_tiles
            )
            if fits and (best is None or row.num_tokens > best.num_tokens):
                best = row
        if best is None:
            best = Row(opened_at=self._seen)
            self._rows.append(best)
        best.add(sample)
        return self._close()

    def _close(self) -> list[Row]:
        closed = [
            row
            for row in self._rows
            if row.num_tokens == self.config.row_tokens
            or self._seen - row.opened_at >= self.config.wait_samples
        ]
        shut = {id(row) for row in closed}
        still = [row for row in self._rows if id(row) not in shut]
        while len(still) > self.config.open_rows:
            fullest = max(still, key=lambda row: row.num_tokens)
            still = [row for row in still if row is not fullest]
            closed.append(fullest)
        self._rows = still
        return closed

    def flush(self) -> list[Row]:
        """Close all rows, in the order in which they were opened."""
        rows, self._rows = self._rows, []
        return rows

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold: positions, no tokens."""
        rows = [[row.opened_at, [s.position for s in row.samples]] for row in self._rows]
        return {"seen": self._seen, "rows": rows}

    def restore(self, state: dict[str, Any], samples: Sequence[Packable]) -> None:
        """Go back to a state, given the samples that waited, planned again in any order."""
        by_position = {sample.position: sample for sample in samples}
        self._seen = state["seen"]
        self._rows = []
        for opened_at, positions in state["rows"]:
            row = Row(opened_at=opened_at)
            for position in positions:
                row.add(by_position[position])
            self._rows.append(row)
