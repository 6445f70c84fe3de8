"""The connector `perceiver`: learnt latents read the picture (Flamingo, arXiv 2204.14198).

In the shape of Idefics2 (arXiv 2405.02246): features are brought to the text width by a gated
MLP first, every layer attends over picture and latents together, norms divide by the root mean
square. However large the picture, as many tokens come out as there are latents.
"""

from __future__ import annotations

from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmlm.connectors.activations import ActivationName
from mmlm.connectors.attention import STD, Attention, Initialisation, mimetic_, normal_
from mmlm.connectors.base import Connector, ConnectorConfig, connectors
from mmlm.connectors.gated_mlp import GatedMLP
from mmlm.connectors.groups import each_group
from mmlm.features import Grid, VisionFeatures


@connectors.register("perceiver")
class PerceiverConnectorConfig(ConnectorConfig):
    """Let learnt latents read the picture; a fixed number of tokens (Flamingo, Idefics2).

    The defaults are those of `Idefics2ForConditionalGeneration`.
    """

    tokens: int = Field(default=64, ge=1)
    """Number of latents: the tokens of a picture, or of a clip of frames."""

    depth: int = Field(default=3, ge=1)
    """Number of layers."""

    heads: int = Field(default=16, ge=1)
    """Number of heads."""

    head_width: int = Field(default=96, ge=1)
    """Width of one head."""

    key_heads: int = Field(default=4, ge=1)
    """Number of key and value heads, which divides `heads`."""

    project_width: int | None = Field(default=None, ge=1)
    """Width inside the gated MLP before the layers; by default four times the text width."""

    activation: ActivationName = "silu"
    """Of the gated MLPs, by its name in transformers."""

    eps: float = Field(default=1e-6, gt=0)
    """Added to the mean square in the norms."""

    init: Initialisation = "normal"
    """How attention begins: normal, or mimetic (arXiv 2305.09828), for `key_heads` = `heads`."""

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.heads % self.key_heads:
            raise ValueError(f"key_heads {self.key_heads} does not divide heads {self.heads}")
        if self.init == "mimetic" and self.key_heads != self.heads:
            raise ValueError(
                f"init mimetic pairs every head with a key head; set key_heads to {self.heads}"
            )
        return self

    def out_grid(self, grid: Grid) -> Grid:
        """Return one row of latents."""
        return Grid(1, 1, self.tokens)

    def build(self, *, vision_width: int, text_width: int) -> PerceiverConnector:
        """Build the connector between features and embeddings of these widths."""
        return PerceiverConnector(vision_width, text_width, self)


class PerceiverLayer(nn.Module):
    """Latents read picture and latents, then go through a gated MLP; both beside a bypass.

    Shapes:
        latents: ``(items, latents, width)``
        context: ``(items, tokens, width)``
    """

    def __init__(self, width: int, config: PerceiverConnectorConfig) -> None:
        super().__init__()
        self.latent_norm = nn.RMSNorm(width, eps=config.eps)
        self.context_norm = nn.RMSNorm(width, eps=config.eps)
        self.attention = Attention(
            width,
            width,
            heads=config.heads,
            head_width=config.head_width,
            key_heads=config.key_heads,
            bias=False,
        )
        self.mlp_norm = nn.RMSNorm(width, eps=config.eps)
        self.mlp = GatedMLP(width, 4 * width, width, activation_name=config.activation, bias=False)

    def forward(self, latents: Tensor, context: Tensor) -> Tensor:
        """Return the latents after the layer."""
        queries = self.latent_norm(latents)
        both = torch.cat([self.context_norm(context), queries], dim=1)
        latents = latents + self.attention(queries, both)
        return latents + self.mlp(self.mlp_norm(latents))


class PerceiverConnector(Connector):
    """Reads each picture with the same latents.

    Shapes:
        values:  ``(tokens, vision_width)``
        returns: ``(items · config.tokens, text_width)``
    """

    def __init__(
        self, vision_width: int, text_width: int, config: PerceiverConnectorConfig
    ) -> None:
        super().__init__()
        self.config = config
        self.project = GatedMLP(
            vision_width,
            config.project_width or 4 * text_width,
            text_width,
            activation_name=config.activation,
            bias=False,
        )
        self.latents = nn.Parameter(torch.empty(config.tokens, text_width))
        self.layers = nn.ModuleList(PerceiverLayer(text_width, config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(text_width, eps=config.eps)
        normal_(self)
        # Latents that are all alike, as a stock class makes them, would stay alike for ever.
        nn.init.normal_(self.latents, std=STD)
        if config.init == "mimetic":
            for layer in self.layers:
                assert isinstance(layer, PerceiverLayer)
                mimetic_(layer.attention)

    def forward(self, features: VisionFeatures) -> VisionFeatures:
        """Read each picture."""
        return each_group(features, self._read, self.config.out_grid)

    def _read(self, maps: list[Tensor]) -> Tensor:
        context = self.project(maps[0].flatten(1, 3))
        latents = self.latents.expand(context.shape[0], -1, -1)
        for layer in self.layers:
            latents = layer(latents, context)
        return self.norm(latents)
