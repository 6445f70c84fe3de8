"""The connector `semantic_tokens`: the picture is pooled into a few tokens by learnt attention.

Visual Transformers (Wu et al. 2020, arXiv 2006.03677): a filter for each token gives every place
a weight by softmax, and the token is the weighted mean. From the second round on the filters
come from the tokens of the round before (recurrent tokeniser), so that they fit the picture. A
transformer layer over the tokens follows each round. Works on maps of CNNs as on ViTs.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from mmlm.connectors.base import Connector, ConnectorConfig, connectors
from mmlm.connectors.groups import each_group
from mmlm.features import Grid, VisionFeatures


@connectors.register("semantic_tokens")
class SemanticTokensConnectorConfig(ConnectorConfig):
    """Pool the picture into a few tokens by learnt spatial attention (Visual Transformers)."""

    tokens: int = Field(default=16, ge=1)
    """Number of semantic tokens of a picture; 8 to 16 in the paper."""

    rounds: int = Field(default=2, ge=1)
    """How often the picture is pooled: once by fixed filters, then by those of the tokens."""

    width: int | None = Field(default=None, ge=1)
    """Width of the tokens; by default that of the features."""

    def out_grid(self, grid: Grid) -> Grid:
        """Return one row of tokens."""
        return Grid(1, 1, self.tokens)

    def build(self, *, vision_width: int, text_width: int) -> SemanticTokensConnector:
        """Build the connector between features and embeddings of these widths."""
        return SemanticTokensConnector(vision_width, text_width, self)


class TokenTransformer(nn.Module):
    """The paper's light transformer over tokens: ``T + softmax(TK (TQ)ᵀ) T``, then an MLP.

    Shapes:
        tokens: ``(items, tokens, width)``
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.key = nn.Linear(width, width, bias=False)
        self.query = nn.Linear(width, width, bias=False)
        self.widen = nn.Linear(width, width, bias=False)
        self.narrow = nn.Linear(width, width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the tokens after the layer."""
        scores = self.key(tokens) @ self.query(tokens).transpose(1, 2)
        # The paper has no scale; with it the width does not sharpen the softmax.
        tokens = tokens + (scores / tokens.shape[-1] ** 0.5).softmax(-1) @ tokens
        return tokens + self.narrow(self.widen(tokens).relu())


class SemanticTokensConnector(Connector):
    """Pools each picture into the same number of tokens.

    Shapes:
        values:  ``(tokens, vision_width)``
        returns: ``(items · config.tokens, text_width)``
    """

    def __init__(
        self, vision_width: int, text_width: int, config: SemanticTokensConnectorConfig
    ) -> None:
        super().__init__()
        self.config = config
        width = config.width or vision_width
        self.norm = nn.LayerNorm(vision_width)
        self.value = nn.Linear(vision_width, width)
        self.filters = nn.Linear(vision_width, config.tokens, bias=False)
        self.filters_of_tokens = nn.ModuleList(
            nn.Linear(width, vision_width, bias=False) for _ in range(config.rounds - 1)
        )
        self.transformers = nn.ModuleList(TokenTransformer(width) for _ in range(config.rounds))
        self.out_norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, text_width)

    def forward(self, features: VisionFeatures) -> VisionFeatures:
        """Pool each picture."""
        return each_group(features, self._pool, self.config.out_grid)

    def _pool(self, maps: list[Tensor]) -> Tensor:
        places = self.norm(maps[0].flatten(1, 3))
        values = self.value(places)
        weights = self.filters(places)
        tokens = _weighted_mean(weights, values)
        for index, transformer in enumerate(self.transformers):
            if index:
                filters = self.filters_of_tokens[index - 1](tokens)
                weights = places @ filters.transpose(1, 2) / places.shape[-1] ** 0.5
                tokens = tokens + _weighted_mean(weights, values)
            tokens = transformer(tokens)
        return self.project(self.out_norm(tokens))

    def last_linear(self) -> nn.Linear:
        """Return the layer to the text width."""
        return self.project


def _weighted_mean(weights: Tensor, values: Tensor) -> Tensor:
    """Average the places by a softmax over them.

    Shapes:
        weights: ``(items, places, tokens)``
        values:  ``(items, places, width)``
        returns: ``(items, tokens, width)``
    """
    return torch.einsum("bpt,bpw->btw", weights.softmax(1), values)
