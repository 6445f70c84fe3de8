"""How even is the work of 1,024 ranks?  The packer on a simulated mixture, without a model.

    python benchmarks/rank_balance.py [--ranks 1024] [--rows-per-rank 4] [--steps 5] [--by-cost]

A sample has zero, one or more pictures and a log-normal length of text; the shares are those of a
LLaVA-like mixture. Rows are filled by the packer that training uses, and dealt to the ranks by what
they cost, by the function that training uses. A row costs what its tokens cost in the linear
layers, what its samples cost in attention, and what its tiles cost in the encoder. Printed: the
slowest rank over the mean of all, for each step; in a step everybody waits for the slowest.

`--by-cost` fills rows by what samples cost instead of how long they are: a sample counts as many
places as tokens of the linear layers would cost the same, and a row has as many places as the
longest sample costs. The packer is the same; training does not fill rows like that yet.
"""

from __future__ import annotations

import argparse
import math
import random
from dataclasses import dataclass

from mmlm.data.dealing import deal
from mmlm.data.packing import Packer, PackingConfig, Row


@dataclass(frozen=True)
class Shape:
    """A model, as far as its cost goes: a 7B decoder and a ViT-L by default.

    Args:
        width: Of the decoder.
        layers: Of the decoder.
        weights: Of the decoder's linear layers.
        tile_flops: Of the encoder for one tile, forward.
        encoder_learns: Whether the encoder also runs backward.
    """

    width: int = 4096
    layers: int = 32
    weights: float = 6.6e9
    tile_flops: float = 3.6e11
    encoder_learns: bool = False

    def flops(self, row: Row) -> float:
        """Return what a row costs, forward and backward."""
        linear = 6 * self.weights * row.num_tokens
        attention = sum(6 * self.layers * self.width * s.num_tokens**2 for s in row.samples)
        return (
            linear + attention + row.num_tiles * self.tile_flops * (3 if self.encoder_learns else 1)
        )

    def places(self, sample: Sample) -> int:
        """Return what a sample costs, in tokens of the linear layers."""
        row = Row([sample])
        return math.ceil(self.flops(row) / (6 * self.weights))


@dataclass(frozen=True)
class Sample:
    """A simulated sample."""

    position: int
    num_tokens: int
    num_tiles: int


@dataclass(frozen=True)
class Weighed:
    """A sample whose length for the packer is what it costs."""

    sample: Sample
    num_tokens: int

    @property
    def position(self) -> int:
        """Its place in the order."""
        return self.sample.position

    @property
    def num_tiles(self) -> int:
        """Its image tiles."""
        return self.sample.num_tiles


def sample_at(position: int, row_tokens: int, tokens_per_tile: int = 576) -> Sample:
    """Return the simulated sample at a position; always the same one."""
    draw = random.Random(position)
    pictures = draw.choices([0, 1, 2, 5], [0.15, 0.7, 0.1, 0.05])[0]
    text = round(draw.lognormvariate(5.2, 0.8)) + 8
    tokens = min(pictures * tokens_per_tile + text, row_tokens)
    return Sample(position, tokens, min(pictures, tokens // tokens_per_tile))


def simulate(
    *,
    ranks: int,
    rows_per_rank: int,
    steps: int,
    row_tokens: int = 4096,
    shape: Shape | None = None,
    by_cost: bool = False,
) -> list[float]:
    """Return the slowest rank over the mean, for each step."""
    shape = shape or Shape()
    longest = Sample(0, row_tokens, row_tokens // 576)
    places = shape.places(longest) if by_cost else row_tokens
    packer = Packer(PackingConfig(row_tokens=places))
    rows: list[Row] = []
    position = 0
    found: list[float] = []
    for _ in range(steps):
        while len(rows) < ranks * rows_per_rank:
            sample = sample_at(position, row_tokens)
            position += 1
            if by_cost:
                closed = packer.add(Weighed(sample, shape.places(sample)))
                rows += [Row([one.sample for one in row.samples]) for row in closed]
            else:
                rows += packer.add(sample)
        now, rows = rows[: ranks * rows_per_rank], rows[ranks * rows_per_rank :]
        costs = [shape.flops(row) for row in now]
        work = [sum(costs[number] for number in numbers) for numbers in deal(costs, ranks)]
        found.append(max(work) / (sum(work) / ranks))
    return found


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--rows-per-rank", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--by-cost", action="store_true", help="fill rows by cost, not by length")
    options = parser.parse_args()
    print(f"{options.ranks} ranks, {options.rows_per_rank} rows of 4,096 tokens each a step")
    for name, shape in {
        "7B, encoder frozen": Shape(),
        "7B, encoder learns": Shape(encoder_learns=True),
        "0.5B, encoder frozen": Shape(896, 24, 3.6e8),
    }.items():
        found = simulate(
            ranks=options.ranks,
            rows_per_rank=options.rows_per_rank,
            steps=options.steps,
            shape=shape,
            by_cost=options.by_cost,
        )
        mean = sum(found) / len(found)
        print(f"{name:22} slowest over mean: worst {max(found):.4f}, mean {mean:.4f}", flush=True)


if __name__ == "__main__":
    main()
