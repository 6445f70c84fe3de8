"""The connector `temporal_align`: the present picture reads earlier ones (Libra, arXiv 2411.19378).

    earlier ─┐  where both are alike, a learnt vector is added
             ▼
    present ──► self-attention ──► reads earlier ──► feed-forward ──► MLP ──► tokens

A clip holds the pictures in their order, the present one last (`video: {use: frames, joined:
true}`); the tokens that come out are those of the present alone. Where there is no earlier
picture, the present stands in for it, as in Libra: it is wholly alike, which the learnt vector
says. Libra's weighing of all layers of the encoder is not here.
"""

from __future__ import annotations

from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from mmlm.connectors.activations import ActivationName, activation
from mmlm.connectors.attention import STD, Attention, check_heads, normal_
from mmlm.connectors.base import Connector, ConnectorConfig, connectors
from mmlm.connectors.groups import each_group
from mmlm.features import Grid, VisionFeatures


@connectors.register("temporal_align")
class TemporalAlignConnectorConfig(ConnectorConfig):
    """Let the last frame of a clip read the earlier ones; the tokens of one frame come out."""

    depth: int = Field(default=1, ge=1)
    """Number of layers."""

    width: int = Field(default=768, ge=1)
    """Width inside the layers."""

    heads: int = Field(default=12, ge=1)
    """Number of heads, which divides the width."""

    activation: ActivationName = "gelu"
    """Of the feed-forward layers and the MLP, by its name in transformers."""

    eps: float = Field(default=1e-5, gt=0)
    """Added to the variance in the norms."""

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        check_heads(self.width, self.heads)
        return self

    def out_grid(self, grid: Grid) -> Grid:
        """Return the grid of one frame."""
        return grid._replace(frames=1)

    def build(self, *, vision_width: int, text_width: int) -> TemporalAlignConnector:
        """Build the connector between features and embeddings of these widths."""
        return TemporalAlignConnector(vision_width, text_width, self)


class TemporalLayer(nn.Module):
    """Self-attention, reading of what was earlier, a feed-forward layer; each beside a bypass.

    Shapes:
        present: ``(items, tokens, width)``
        earlier: ``(items, earlier tokens, width)``
    """

    def __init__(self, config: TemporalAlignConnectorConfig) -> None:
        super().__init__()
        width, eps = config.width, config.eps
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.attention = Attention(width, width, heads=config.heads)
        self.reading_norm = nn.LayerNorm(width, eps=eps)
        self.earlier_norm = nn.LayerNorm(width, eps=eps)
        self.reading = Attention(width, width, heads=config.heads)
        self.mlp_norm = nn.LayerNorm(width, eps=eps)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), activation(config.activation), nn.Linear(4 * width, width)
        )

    def forward(self, present: Tensor, earlier: Tensor) -> Tensor:
        """Return the present after the layer."""
        inner = self.attention_norm(present)
        present = present + self.attention(inner, inner)
        read = self.reading(self.reading_norm(present), self.earlier_norm(earlier))
        present = present + read
        return present + self.mlp(self.mlp_norm(present))


class TemporalAlignConnector(Connector):
    """Joins the frames of a clip in the last one.

    Shapes:
        values:  ``(tokens, vision_width)``
        returns: ``(tokens of the last frames, text_width)``
    """

    def __init__(
        self, vision_width: int, text_width: int, config: TemporalAlignConnectorConfig
    ) -> None:
        super().__init__()
        self.config = config
        self.enter = nn.Linear(vision_width, config.width)
        self.alike = nn.Parameter(torch.empty(config.width))
        self.layers = nn.ModuleList(TemporalLayer(config) for _ in range(config.depth))
        self.project = nn.Sequential(
            nn.Linear(config.width, text_width),
            activation(config.activation),
            nn.Linear(text_width, text_width),
        )
        normal_(self.layers)
        nn.init.normal_(self.alike, std=STD)

    def forward(self, features: VisionFeatures) -> VisionFeatures:
        """Join each clip; a picture stands in for its own past."""
        return each_group(features, self._read, self.config.out_grid)

    def _read(self, maps: list[Tensor]) -> Tensor:
        frames = self.enter(maps[0].flatten(2, 3))  # items, frames, places, width
        present = frames[:, -1]
        earlier = frames[:, :-1] if frames.shape[1] > 1 else frames
        # At each place: how alike the present and the earlier picture are, from -1 to 1.
        likeness = functional.cosine_similarity(present[:, None], earlier, dim=-1)
        earlier = (earlier + likeness[..., None] * self.alike).flatten(1, 2)
        for layer in self.layers:
            present = layer(present, earlier)
        return self.project(present)

    def last_linear(self) -> nn.Linear:
        """Return the layer to the text width."""
        last = self.project[-1]
        assert isinstance(last, nn.Linear)
        return last
