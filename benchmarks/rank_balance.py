"""How even is the work of 1,024 ranks?  The packer on a simulated mixture, without a model.

    python benchmarks/rank_balance.py [--ranks 1024] [--rows-per-rank 4] [--steps 5]

A sample has zero, one or more pictures and a log-normal length of text; the shares are those of a
LLaVA-like mixture. Rows are filled by the packer that training uses, and dealt to the ranks as it
deals them. A row costs what its tokens cost in the linear layers, what its samples cost in
attention, and what its tiles cost in the encoder. Printed: the slowest rank over the mean of all,
for each step; in a step everybody waits for the slowest.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Sample:
    """A simulated sample."""

    position: int
    num_tokens: int
    num_tiles: int


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
) -> list[float]:
    """Return the slowest rank over the mean, for each step."""
    shape = shape or Shape()
    packer = Packer(PackingConfig(row_tokens=row_tokens))
    rows: list[Row] = []
    position = 0
    found: list[float] = []
    for _ in range(steps):
        while len(rows) < ranks * rows_per_rank:
            rows += packer.add(sample_at(position, row_tokens))
            position += 1
        now, rows = rows[: ranks * rows_per_rank], rows[ranks * rows_per_rank :]
        work = [sum(map(shape.flops, now[rank::ranks])) for rank in range(ranks)]
        found.append(max(work) / (sum(work) / ranks))
    return found


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--rows-per-rank", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
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
        )
        mean = sum(found) / len(found)
        print(f"{name:22} slowest over mean: worst {max(found):.4f}, mean {mean:.4f}", flush=True)


if __name__ == "__main__":
    main()
