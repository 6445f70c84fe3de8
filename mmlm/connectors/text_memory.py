"""The connector `text_memory`: patches ask the question's words, and the background goes (EEVG).

    question ──► reader ──► memory ─────────────┐
    features ──► [ see one another, read memory, MLP ] × depth ──► linear ──► tokens
                      └─► after layer `drop_after`: patches that others look at least go

EEVG (arXiv 2408.01120) fuses by a decoder instead of an encoder over both: visual tokens are the
queries and language is the memory, so that the cost grows linearly with the length of the text.
Background tokens are left out by their attention scores, without parameters of their own. Here a
score is the attention that a patch gets from all patches of its picture in that layer, after the
question was read in the layers before. How many stay is a share of the grid, so that tokens are
counted from sizes alone. The paper's heads for boxes and masks are left out: the language model
writes a box as text.
"""

from __future__ import annotations

from math import ceil
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmlm.connectors.attention import Attention
from mmlm.connectors.base import Connector, connectors
from mmlm.connectors.question import (
    QuestionConfig,
    QuestionReader,
    WordAttention,
    Words,
    waves,
    words_of,
)
from mmlm.errors import ConfigError
from mmlm.features import Grid, VisionFeatures, by_grid


@connectors.register("text_memory")
class TextMemoryConnectorConfig(QuestionConfig):
    """Let patches read the question as memory, and leave out those of the background."""

    depth: int = Field(default=3, ge=1)
    """Layers of the decoder."""

    width: int | None = Field(default=None, ge=1)
    """Width inside; by default that of the features."""

    heads: int = Field(default=8, ge=1)
    """Number of heads, which divides the width."""

    keep: float = Field(default=0.5, gt=0, le=1)
    """Share of a picture's features that stays; 1 keeps all."""

    drop_after: int = Field(default=2, ge=1)
    """After which layer the others are left out, counted from 1."""

    @model_validator(mode="after")
    def _inside(self) -> Self:
        if self.drop_after > self.depth:
            raise ValueError(f"drop_after {self.drop_after} is beyond depth {self.depth}")
        return self

    def out_grid(self, grid: Grid) -> Grid:
        """Return the tokens that stay, in their order."""
        return grid if self.keep == 1 else Grid(1, 1, ceil(self.keep * grid.num_tokens))

    def build(self, *, vision_width: int, text_width: int) -> TextMemoryConnector:
        """Build the connector between features and embeddings of these widths."""
        return TextMemoryConnector(vision_width, text_width, self)


class _Layer(nn.Module):
    """Patches see one another, read the memory, and go through a feed-forward layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, width, heads=heads)
        self.read = WordAttention(width, width, heads)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, tokens: Tensor, words: Words | None) -> Tensor:
        given = self.norm(tokens)
        tokens = tokens + self.attention(given, given)
        if words is not None:
            tokens = tokens + self.read(tokens, words)
        return tokens + self.mlp(tokens)

    @torch.no_grad()
    def looked_at(self, tokens: Tensor) -> Tensor:
        """Return how much attention each token gets from all of its item: ``(items, tokens)``."""
        given, heads = self.norm(tokens), self.attention.heads
        query, key = (
            layer(given).unflatten(-1, (heads, -1)).transpose(1, 2).float()
            for layer in (self.attention.query, self.attention.key)
        )
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        return scores.softmax(-1).mean((1, 2))


class TextMemoryConnector(Connector):
    """Fuses features with the question, and leaves the background out.

    Shapes:
        values:  ``(tokens, vision_width)``
        words:   ``(words, text_width)`` of each item
        returns: ``(tokens that stay, text_width)``
    """

    def __init__(
        self, vision_width: int, text_width: int, config: TextMemoryConnectorConfig
    ) -> None:
        super().__init__()
        width = config.width or vision_width
        if width % config.heads:
            raise ConfigError(f"connector.heads {config.heads} does not divide the width {width}.")
        self.config = config
        self.reader = QuestionReader(text_width, width, config)
        self.enter = nn.Linear(vision_width, width)
        self.layers = nn.ModuleList(_Layer(width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, text_width)

    def forward(self, features: VisionFeatures) -> VisionFeatures:
        """Return the tokens that stay."""
        words = words_of(features, self.reader)
        items = features.items()
        found: dict[int, Tensor] = {}
        for grid, members in by_grid(features):
            tokens = self.enter(torch.stack([items[index] for index in members]))
            tokens = tokens + _places(grid, tokens.shape[-1], tokens)
            done = self._decoded(tokens, None if words is None else words[members], grid)
            found |= dict(zip(members, done, strict=True))
        grids = [self.config.out_grid(grid) for grid in features.grids]
        values = torch.cat([found[index] for index in range(len(grids))])
        return features.with_values(self.project(self.norm(values)), grids)

    def _decoded(self, tokens: Tensor, words: Words | None, grid: Grid) -> Tensor:
        """Run the layers on items of one grid."""
        count = self.config.out_grid(grid).num_tokens
        layers: list[Any] = list(self.layers)
        for number, layer in enumerate(layers, start=1):
            drops = number == self.config.drop_after and count < tokens.shape[1]
            scores = layer.looked_at(tokens) if drops else None
            tokens = layer(tokens, words)
            if scores is not None:
                stay = scores.topk(count, dim=-1).indices.sort(-1).values
                tokens = tokens.gather(1, stay[..., None].expand(-1, -1, tokens.shape[-1]))
        return tokens

    def last_linear(self) -> nn.Linear:
        """Return the layer to the text width."""
        return self.project


def _places(grid: Grid, width: int, like: Tensor) -> Tensor:
    """Return where each feature stands, as sines and cosines of its row and its column."""
    half = width // 2
    rows = waves(torch.arange(grid.rows, device=like.device), half)
    columns = waves(torch.arange(grid.columns, device=like.device), width - half)
    both = torch.cat(
        [
            rows[:, None].expand(-1, grid.columns, -1),
            columns[None].expand(grid.rows, -1, -1),
        ],
        dim=-1,
    )
    return both.flatten(0, 1).repeat(grid.frames, 1).to(like)
