"""The connector `cross_attention`: the language model reads pictures between its layers (Flamingo).

A picture is one placeholder. Its features, of which a Perceiver may leave a fixed number, are read
by new layers that stand before every n-th layer of the language model: attention over the picture,
then a feed-forward layer, both behind a gate that begins closed (tanh of zero). Untrained, the
language model is what it was (arXiv 2204.14198). A word reads the last picture before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from mmlm.connectors.activations import ActivationName, activation
from mmlm.connectors.attention import STD, Attention, normal_
from mmlm.connectors.base import ConnectorConfig, connectors
from mmlm.connectors.injection import Injecting, Seen, spread
from mmlm.connectors.perceiver import PerceiverConnectorConfig
from mmlm.errors import ConfigError
from mmlm.features import Grid, VisionFeatures


@connectors.register("cross_attention")
class CrossAttentionConnectorConfig(ConnectorConfig):
    """Let layers of gated cross-attention read the picture, between those of the LLM (Flamingo)."""

    blocks: int = Field(default=4, ge=1)
    """How many layers of cross-attention there are."""

    start: int = Field(default=0, ge=0)
    """The first layer of the language model before which one stands."""

    interval: int = Field(default=4, ge=1)
    """From one such layer to the next."""

    tokens: int | None = Field(default=64, ge=1)
    """To how many a Perceiver brings the features of a picture; null reads all of them."""

    heads: int = Field(default=8, ge=1)
    """Number of heads, which divides the text width."""

    mlp_factor: int = Field(default=4, ge=1)
    """Width of the feed-forward layers, in text widths."""

    activation: ActivationName = "gelu"
    """Of the feed-forward layers, by its name in transformers."""

    latest: bool = True
    """Whether a word reads the last picture before it alone, or all pictures before it."""

    def out_grid(self, grid: Grid) -> Grid:
        """Return one token, which marks the place of the picture."""
        return Grid(1, 1, 1)

    def build(self, *, vision_width: int, text_width: int) -> CrossAttentionConnector:
        """Build the connector between features and embeddings of these widths."""
        return CrossAttentionConnector(vision_width, text_width, self)


class GatedBlock(nn.Module):
    """Attention over the picture and a feed-forward layer, each behind a gate that begins closed.

    Shapes:
        hidden:  ``(batch, tokens, width)``
        context: ``(batch, context, width)``
        mask:    ``(batch, tokens, context)``
    """

    def __init__(self, width: int, config: CrossAttentionConnectorConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, width, heads=config.heads, bias=False)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, config.mlp_factor * width, bias=False),
            activation(config.activation),
            nn.Linear(config.mlp_factor * width, width, bias=False),
        )
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.mlp_gate = nn.Parameter(torch.zeros(1))

    def forward(self, hidden: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """Return the hidden states after both."""
        given = hidden.to(context.dtype)
        sees = mask.any(-1, keepdim=True)
        # A word that sees nothing would divide by zero: it reads everything, and forgets it.
        read = self.attention(self.norm(given), context, mask=(mask | ~sees)[:, None])
        given = given + self.attention_gate.tanh() * torch.where(sees, read, 0.0)
        given = given + self.mlp_gate.tanh() * torch.where(sees, self.mlp(given), 0.0)
        return given.to(hidden.dtype)


class CrossAttentionConnector(Injecting):
    """Marks the place of each picture, and keeps its features for the layers between.

    Shapes:
        values:  ``(tokens, vision_width)``
        returns: ``(items, text_width)``, the same mark for each; what is read, as its one layer
    """

    keeps_pictures = True

    def __init__(
        self, vision_width: int, text_width: int, config: CrossAttentionConnectorConfig
    ) -> None:
        super().__init__()
        if text_width % config.heads:
            raise ConfigError(
                f"connector.heads {config.heads} does not divide the text width {text_width}."
            )
        self.config = config
        self.mark = nn.Parameter(torch.empty(text_width))
        self.blocks = nn.ModuleList(GatedBlock(text_width, config) for _ in range(config.blocks))
        normal_(self)
        nn.init.normal_(self.mark, std=STD)
        self.project: nn.Module
        if config.tokens is None:
            self.project = nn.Linear(vision_width, text_width)
        else:
            perceiver = PerceiverConnectorConfig(
                tokens=config.tokens,
                depth=1,
                heads=config.heads,
                head_width=text_width // config.heads,
                key_heads=config.heads,
            )
            self.project = perceiver.build(vision_width=vision_width, text_width=text_width)

    def forward(self, features: VisionFeatures) -> VisionFeatures:
        """Return a mark for each picture, and its features for later."""
        if isinstance(self.project, nn.Linear):
            read = VisionFeatures(self.project(features.values), features.grids)
        else:
            read = self.project(VisionFeatures(features.values, features.grids))
        count = len(features.grids)
        marks = self.mark.to(read.values.dtype).expand(count, -1)
        return VisionFeatures(marks, (Grid(1, 1, 1),) * count, layers=(read,))

    def places(self, num_layers: int) -> tuple[int, ...]:
        """Return the layers before which one of cross-attention stands."""
        config = self.config
        count, start, interval = config.blocks, config.start, config.interval
        return spread(count, start, interval, num_layers, name="cross_attention")

    def kept(self, features: VisionFeatures) -> Sequence[Tensor]:
        """Return what each new picture gives to read."""
        return features.layers[0].items()

    def inject(self, index: int, hidden: Tensor, seen: Seen) -> Tensor:
        """Let the words read the pictures before them."""
        if not any(seen.rows):
            return hidden
        context, mask = seen.context(latest=self.config.latest)
        return self.blocks[index](hidden, context, mask)
