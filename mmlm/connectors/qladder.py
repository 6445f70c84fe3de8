"""The connector `qladder`: learnt queries climb the layers of the encoder (Arcana, 2410.13733).

Beside the features go a few tokens more: queries that read one layer of the frozen encoder after
another, from the first to the last, and so bring what its last layer has forgotten. Features
and queries are then projected by the same MLP.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from mmlm.connectors.attention import STD, Attention
from mmlm.connectors.base import Connector, ConnectorConfig, connectors
from mmlm.connectors.groups import each_group
from mmlm.errors import ConfigError
from mmlm.features import Grid, VisionFeatures


@connectors.register("qladder")
class QLadderConnectorConfig(ConnectorConfig):
    """Append queries that have read the encoder layer by layer (Arcana's QLadder).

    The paper reads every layer of CLIP-L (`layers: 24`) with 64 queries.
    """

    queries: int = Field(default=64, ge=1)
    """Number of queries: tokens beside those of the features."""

    layers: int = Field(default=0, ge=0)
    """How many layers of the encoder the queries climb; 0 is the features alone, once."""

    heads: int = Field(default=8, ge=1)
    """Number of heads, which divides the width of the encoder."""

    def out_grid(self, grid: Grid) -> Grid:
        """Return one row: the features, then the queries."""
        return Grid(1, 1, grid.num_tokens + self.queries)

    def build(self, *, vision_width: int, text_width: int) -> QLadderConnector:
        """Build the connector between features and embeddings of these widths."""
        if vision_width % self.heads:
            raise ConfigError(
                f"connector.heads {self.heads} does not divide the width of the encoder, "
                f"{vision_width}. Choose a number of heads that does."
            )
        return QLadderConnector(vision_width, text_width, self)


class Rung(nn.Module):
    """Queries read one layer, then go through an MLP; norms before, a bypass beside each.

    Shapes:
        queries: ``(items, queries, width)``
        layer:   ``(items, tokens, width)``
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(width)
        self.layer_norm = nn.LayerNorm(width)
        self.attention = Attention(width, width, heads=heads)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, queries: Tensor, layer: Tensor) -> Tensor:
        """Return the queries after the rung."""
        queries = queries + self.attention(self.query_norm(queries), self.layer_norm(layer))
        return queries + self.mlp(queries)


class QLadderConnector(Connector):
    """Projects the features, and queries that have climbed the layers.

    Shapes:
        values:  ``(tokens, vision_width)``
        layers:  as many of the same width as the config says
        returns: ``(tokens + items · config.queries, text_width)``, queries behind each item
    """

    def __init__(self, vision_width: int, text_width: int, config: QLadderConnectorConfig) -> None:
        super().__init__()
        self.config = config
        self.queries = nn.Parameter(torch.empty(config.queries, vision_width))
        nn.init.normal_(self.queries, std=STD)
        self.rungs = nn.ModuleList(
            Rung(vision_width, config.heads) for _ in range(max(1, config.layers))
        )
        self.project = nn.Sequential(
            nn.Linear(vision_width, text_width), nn.GELU(), nn.Linear(text_width, text_width)
        )

    def forward(self, features: VisionFeatures) -> VisionFeatures:
        """Project each picture."""
        return each_group(features, self._climb, self.config.out_grid, layers=self.config.layers)

    def _climb(self, maps: list[Tensor]) -> Tensor:
        tokens, *layers = (each.flatten(1, 3) for each in maps)
        queries = self.queries.expand(tokens.shape[0], -1, -1)
        for rung, layer in zip(self.rungs, layers or [tokens], strict=True):
            queries = rung(queries, layer)
        return self.project(torch.cat([tokens, queries], dim=1))

    def last_linear(self) -> nn.Linear:
        """Return the last layer."""
        last = self.project[-1]
        assert isinstance(last, nn.Linear)
        return last
