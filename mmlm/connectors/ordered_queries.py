"""The connector `ordered_queries`: the most important tokens first, so that any prefix works.

Queries read the picture, and each sees only the queries before it, so that the first k tokens
never depend on those after them; `visual_tokens` in the settings of an answer shows that many.
While training, a random tail is blanked (nested dropout;
Rippel et al. 2014): what matters is pressed to the front. The same weights with the first k
queries alone (`tokens: k`) give the first k tokens. The idea is that of One-D-Piece (arXiv
2501.10064) and FlexTok (arXiv 2502.13967), whose tokens rebuild pictures.
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmlm.connectors.activations import ActivationName, activation
from mmlm.connectors.attention import STD, Attention, Initialisation, check_heads, mimetic_, normal_
from mmlm.connectors.base import Connector, ConnectorConfig, connectors
from mmlm.connectors.groups import each_group
from mmlm.connectors.prefix import num_shown
from mmlm.errors import ConfigError
from mmlm.features import Grid, VisionFeatures


@connectors.register("ordered_queries")
class OrderedQueriesConnectorConfig(ConnectorConfig):
    """Let queries read the picture in order of weight, so that any number of first ones works."""

    ordered: ClassVar[bool] = True

    tokens: int = Field(default=64, ge=1)
    """Number of queries: the most tokens of a picture."""

    depth: int = Field(default=2, ge=1)
    """Number of layers."""

    width: int | None = Field(default=None, ge=1)
    """Width of the queries; by default that of the language model."""

    heads: int = Field(default=8, ge=1)
    """Number of heads, which divides the width."""

    activation: ActivationName = "gelu"
    """Of the feed-forward layers, by its name in transformers."""

    tail_drop: float = Field(default=0.5, ge=0, le=1)
    """In training, the share of pictures of which a random tail is blanked."""

    least: int = Field(default=1, ge=1)
    """In training, the fewest tokens that are kept."""

    init: Initialisation = "mimetic"
    """How the queries' attention among themselves begins: normal or mimetic (2305.09828)."""

    @model_validator(mode="after")
    def _least_fits(self) -> Self:
        if self.least > self.tokens:
            raise ValueError(f"least {self.least} exceeds the {self.tokens} tokens; lower it")
        if self.width is not None:
            check_heads(self.width, self.heads)
        return self

    def out_grid(self, grid: Grid) -> Grid:
        """Return one row of queries: all, or as many as are shown (`visual_tokens`)."""
        return Grid(1, 1, num_shown(self.tokens))

    def build(self, *, vision_width: int, text_width: int) -> OrderedQueriesConnector:
        """Build the connector between features and embeddings of these widths."""
        return OrderedQueriesConnector(vision_width, text_width, self)


class OrderedLayer(nn.Module):
    """Each query reads the queries up to itself, then the picture; norms stand before.

    Shapes:
        queries: ``(items, queries, width)``
        context: ``(items, tokens, vision_width)``
    """

    def __init__(
        self, vision_width: int, width: int, config: OrderedQueriesConnectorConfig
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, width, heads=config.heads)
        self.reading_norm = nn.LayerNorm(width)
        self.context_norm = nn.LayerNorm(vision_width)
        self.reading = Attention(width, vision_width, heads=config.heads)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            activation(config.activation),
            nn.Linear(4 * width, width),
        )

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """Return the queries after the layer."""
        normed = self.attention_norm(queries)
        queries = queries + self.attention(normed, normed, causal=True)
        queries = queries + self.reading(self.reading_norm(queries), self.context_norm(context))
        return queries + self.mlp(queries)


class OrderedQueriesConnector(Connector):
    """Reads each picture with the same queries, the first for what matters most.

    Shapes:
        values:  ``(tokens, vision_width)``
        returns: ``(items · config.tokens, text_width)``; in training some tails are `blank`
    """

    def __init__(
        self, vision_width: int, text_width: int, config: OrderedQueriesConnectorConfig
    ) -> None:
        super().__init__()
        self.config = config
        width = config.width or text_width
        if width % config.heads:
            raise ConfigError(
                f"connector.heads {config.heads} does not divide the text width {width}. Set "
                f"connector.heads, or connector.width to a multiple of it."
            )
        self.queries = nn.Parameter(torch.empty(config.tokens, width))
        self.layers = nn.ModuleList(
            OrderedLayer(vision_width, width, config) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, text_width)
        self.blank = nn.Parameter(torch.empty(text_width)) if config.tail_drop else None
        normal_(self)
        nn.init.normal_(self.queries, std=STD)
        if self.blank is not None:
            nn.init.normal_(self.blank, std=STD)
        if config.init == "mimetic":
            for layer in self.layers:
                assert isinstance(layer, OrderedLayer)
                mimetic_(layer.attention)

    def forward(self, features: VisionFeatures) -> VisionFeatures:
        """Read each picture."""
        return each_group(features, self._read, self.config.out_grid)

    def _read(self, maps: list[Tensor]) -> Tensor:
        context = maps[0].flatten(1, 3)
        shown = self.queries[: num_shown(self.config.tokens)]
        queries = shown.expand(context.shape[0], -1, -1)
        for layer in self.layers:
            queries = layer(queries, context)
        tokens = self.project(self.norm(queries))
        if self.blank is None or not self.training:
            return tokens
        kept = self._lengths(tokens.shape[0]).to(tokens.device)
        tail = torch.arange(tokens.shape[1], device=tokens.device) >= kept[:, None]
        return torch.where(tail[..., None], self.blank.to(tokens.dtype), tokens)

    def _lengths(self, items: int) -> Tensor:
        """Draw how many tokens of each picture are kept: ``(items,)``."""
        config = self.config
        lengths = torch.randint(config.least, config.tokens + 1, (items,))
        whole = torch.rand(items) >= config.tail_drop
        return lengths.masked_fill(whole, config.tokens)

    def last_linear(self) -> nn.Linear:
        """Return the layer to the text width."""
        return self.project
