"""The connector `qformer`: a small BERT whose queries read the picture (BLIP-2, arXiv 2301.12597).

Queries attend among themselves in every layer and read the picture in every second one; norms
stand after the bypass, as in BERT. InstructBLIP, MiniGPT-4 and Video-LLaMA use the same. Theirs
begin from BERT's weights; here they begin from normal numbers or mimetic ones.
"""

from __future__ import annotations

from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmlm.connectors.activations import ActivationName, activation
from mmlm.connectors.attention import STD, Attention, Initialisation, check_heads, mimetic_, normal_
from mmlm.connectors.base import Connector, ConnectorConfig, connectors
from mmlm.connectors.groups import each_group
from mmlm.features import Grid, VisionFeatures


@connectors.register("qformer")
class QFormerConnectorConfig(ConnectorConfig):
    """Let queries read the picture inside a small BERT; a fixed number of tokens (BLIP-2).

    The defaults are those of `Blip2QFormerModel` and its 32 queries, followed by one linear
    layer to the text width.
    """

    tokens: int = Field(default=32, ge=1)
    """Number of queries: the tokens of a picture, or of a clip of frames."""

    depth: int = Field(default=12, ge=1)
    """Number of layers."""

    width: int = Field(default=768, ge=1)
    """Width of the queries."""

    heads: int = Field(default=12, ge=1)
    """Number of heads, which divides the width."""

    mlp_width: int = Field(default=3072, ge=1)
    """Width inside the feed-forward layers."""

    read_every: int = Field(default=2, ge=1)
    """In which layers the picture is read: the first, and every so many after it."""

    activation: ActivationName = "gelu"
    """Of the feed-forward layers, by its name in transformers."""

    eps: float = Field(default=1e-12, gt=0)
    """Added to the variance in the norms."""

    init: Initialisation = "normal"
    """How the queries' attention among themselves begins: normal, or mimetic (2305.09828)."""

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        check_heads(self.width, self.heads)
        return self

    def out_grid(self, grid: Grid) -> Grid:
        """Return one row of queries."""
        return Grid(1, 1, self.tokens)

    def build(self, *, vision_width: int, text_width: int) -> QFormerConnector:
        """Build the connector between features and embeddings of these widths."""
        return QFormerConnector(vision_width, text_width, self)


class QFormerLayer(nn.Module):
    """Self-attention, reading in some layers, a feed-forward layer; a norm after each.

    Shapes:
        queries: ``(items, queries, width)``
        context: ``(items, tokens, vision_width)``
    """

    def __init__(self, vision_width: int, config: QFormerConnectorConfig, *, reads: bool) -> None:
        super().__init__()
        width, eps = config.width, config.eps
        self.attention = Attention(width, width, heads=config.heads)
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.reading = Attention(width, vision_width, heads=config.heads) if reads else None
        self.reading_norm = nn.LayerNorm(width, eps=eps) if reads else None
        self.mlp = nn.Sequential(
            nn.Linear(width, config.mlp_width),
            activation(config.activation),
            nn.Linear(config.mlp_width, width),
        )
        self.mlp_norm = nn.LayerNorm(width, eps=eps)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """Return the queries after the layer."""
        queries = self.attention_norm(self.attention(queries, queries) + queries)
        if self.reading is not None and self.reading_norm is not None:
            queries = self.reading_norm(self.reading(queries, context) + queries)
        return self.mlp_norm(self.mlp(queries) + queries)


class QFormerConnector(Connector):
    """Reads each picture with the same queries.

    Shapes:
        values:  ``(tokens, vision_width)``
        returns: ``(items · config.tokens, text_width)``
    """

    def __init__(self, vision_width: int, text_width: int, config: QFormerConnectorConfig) -> None:
        super().__init__()
        self.config = config
        self.queries = nn.Parameter(torch.empty(config.tokens, config.width))
        self.norm = nn.LayerNorm(config.width, eps=config.eps)
        self.layers = nn.ModuleList(
            QFormerLayer(vision_width, config, reads=index % config.read_every == 0)
            for index in range(config.depth)
        )
        self.project = nn.Linear(config.width, text_width)
        normal_(self)
        nn.init.normal_(self.queries, std=STD)
        if config.init == "mimetic":
            for layer in self.layers:
                assert isinstance(layer, QFormerLayer)
                mimetic_(layer.attention)

    def forward(self, features: VisionFeatures) -> VisionFeatures:
        """Read each picture."""
        return each_group(features, self._read, self.config.out_grid)

    def _read(self, maps: list[Tensor]) -> Tensor:
        return self.project(self.after_layers(maps[0].flatten(1, 3)))

    def after_layers(self, context: Tensor, beside: Tensor | None = None) -> Tensor:
        """Return the queries that read ``(items, tokens, vision_width)``, before the projection.

        Args:
            context: What is read.
            beside: ``(items, queries, width)``, added to the queries before they begin.
        """
        begin = self.queries if beside is None else self.queries + beside
        queries = self.norm(begin).expand(context.shape[0], -1, -1)
        for layer in self.layers:
            queries = layer(queries, context)
        return queries

    def last_linear(self) -> nn.Linear:
        """Return the layer to the text width."""
        return self.project
