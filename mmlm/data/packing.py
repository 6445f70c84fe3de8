"""Samples share rows, so that no computing is spent on padding.

Samples wait in a pool. The one that has waited longest opens the next row, and the others are
chosen so that the row becomes as full as it can: a subset sum over their lengths, a few big
integers of work. Budgets of tokens, image tiles and encoder patches; a sample is never cut. The
packer sees lengths only, and which samples wait is its whole state, so a run goes on exactly.
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

    pool_samples: int = Field(default=128, ge=1)
    """Samples that wait for a row that they fill best. More waste less space."""

    max_tiles: int = Field(default=256, ge=1)
    """Most image tiles in a row. This bounds the encoder's memory; the text is bounded already."""

    max_patches: int | None = Field(default=None, ge=1)
    """Most patches that the encoder sees in a row, before a reducer joins them. For encoders that
    take pictures at their own size, where a tile may hold ten patches or ten thousand."""

    alike: bool = False
    """Whether samples of like length stand under one another, padded, instead of one behind the
    other."""


class Packable(Protocol):
    """What the packer needs to know of a sample."""

    @property
    def position(self) -> int:
        """Its place in the order."""
        ...

    @property
    def num_tokens(self) -> int:
        """Its length, image tokens included."""
        ...

    @property
    def num_tiles(self) -> int:
        """Its image tiles."""
        ...


def patches_of(sample: Any) -> int:
    """Return the patches that the encoder sees of a sample; what has no pictures has none."""
    return int(getattr(sample, "num_patches", 0))


@dataclass
class Row:
    """Samples that share one row, oldest first."""

    samples: list[Any] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """The length of the row."""
        return sum(sample.num_tokens for sample in self.samples)

    @property
    def num_tiles(self) -> int:
        """The image tiles of the row."""
        return sum(sample.num_tiles for sample in self.samples)

    @property
    def num_patches(self) -> int:
        """The patches that the encoder sees for the row."""
        return sum(map(patches_of, self.samples))


class Packer:
    """Fills rows; see the module's docstring."""

    def __init__(self, config: PackingConfig) -> None:
        self.config = config
        self._pool: list[Any] = []

    def add(self, sample: Packable) -> list[Row]:
        """Take one sample that fits an empty row; return the rows that are closed by it."""
        self._pool.append(sample)
        return [self._take()] if len(self._pool) >= self.config.pool_samples else []

    def flush(self) -> list[Row]:
        """Close rows until no sample waits."""
        rows: list[Row] = []
        while self._pool:
            rows.append(self._take())
        return rows

    def _take(self) -> Row:
        """Make a row of the oldest sample and of those that fill the rest best."""
        oldest, *others = self._pool
        room = self.config.row_tokens - oldest.num_tokens
        if self.config.alike:
            chosen = self._alike(oldest, others)
        else:
            chosen = [oldest, *_fill(others, room)]
            if not self._may_be_seen(chosen):
                chosen = self._within_both(oldest, others)
        taken = {id(sample) for sample in chosen}
        self._pool = [sample for sample in self._pool if id(sample) not in taken]
        return Row(chosen)

    def _within_both(self, oldest: Packable, others: Sequence[Packable]) -> list[Packable]:
        """Choose greedily, longest first, where what the encoder sees is the scarcer budget."""
        chosen = [oldest]
        tokens = oldest.num_tokens
        for sample in sorted(others, key=lambda other: -other.num_tokens):
            if tokens + sample.num_tokens <= self.config.row_tokens and self._may_be_seen(
                [*chosen, sample]
            ):
                chosen.append(sample)
                tokens += sample.num_tokens
        return chosen

    def _may_be_seen(self, chosen: Sequence[Packable]) -> bool:
        """Whether the encoder's budgets hold: tiles, and patches where they are limited."""
        if sum(sample.num_tiles for sample in chosen) > self.config.max_tiles:
            return False
        most = self.config.max_patches
        return most is None or sum(map(patches_of, chosen)) <= most

    def _alike(self, oldest: Packable, others: Sequence[Packable]) -> list[Packable]:
        """Choose those of the nearest lengths, padding counted, and keep them in their order."""
        chosen = [oldest]
        longest = oldest.num_tokens
        for sample in sorted(others, key=lambda one: abs(one.num_tokens - oldest.num_tokens)):
            longer = max(longest, sample.num_tokens)
            if longer * (len(chosen) + 1) <= self.config.row_tokens and self._may_be_seen(
                [*chosen, sample]
            ):
                chosen.append(sample)
                longest = longer
        return sorted(chosen, key=lambda one: one.position)

    @property
    def waiting(self) -> Sequence[Any]:
        """The samples that wait, oldest first."""
        return self._pool

    def state(self) -> list[int]:
        """Return what a checkpoint must hold: the positions of the samples that wait."""
        return [sample.position for sample in self._pool]

    def restore(self, samples: Sequence[Packable]) -> None:
        """Go back to a state, given its samples in order, planned again."""
        self._pool = list(samples)


def _fill(samples: Sequence[Packable], room: int) -> list[Packable]:
    """Choose samples whose lengths add up to `room`, or as near below it as there is.

    Bit `n` of a number says whether `n` tokens can be reached. Going back, a sample is left out
    wherever those before it reach the same sum, so that older samples go first.
    """
    mask = (1 << (room + 1)) - 1
    reached = [1]
    for sample in samples:
        last = reached[-1]
        reached.append((last | last << sample.num_tokens) & mask)
        if reached[-1] >> room:
            break
    total = reached[-1].bit_length() - 1
    chosen: list[Packable] = []
    for index in range(len(reached) - 2, -1, -1):
        if not reached[index] >> total & 1:
            chosen.append(samples[index])
            total -= samples[index].num_tokens
    return chosen[::-1]
