"""The connector `bridge`: later layers of the encoder enter layer after layer (BridgeTower).

As with `deepstack`, features of further encoder layers reach the placeholders inside the language
model, before one layer each. They do so over BridgeTower's bridge layer (arXiv 2206.08657,
section 3.3): the sum of both sides goes through a norm of its own, ``LayerNorm(hidden + W v)``,
so that what stood there is weighed against what comes in. The words' hidden states stay as they
are: here the language model is the text encoder, whose own layers need no bridge.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from mmlm.connectors.base import ConnectorConfig, connectors
from mmlm.connectors.deepstack import DeepStackConnector, DeepStackConnectorConfig
from mmlm.connectors.injection import Seen, spread, write_to_slots


@connectors.register("bridge")
class BridgeConnectorConfig(ConnectorConfig):
    """Norm the sum of hidden states and further encoder layers at the placeholders."""

    layers: int = Field(default=3, ge=1)
    """How many further layers of the encoder are read; as many as `vision.layers` names."""

    start: int = Field(default=1, ge=0)
    """The first layer of the language model before which a bridge stands."""

    interval: int = Field(default=1, ge=1)
    """From one such layer to the next."""

    eps: float = Field(default=1e-5, gt=0)
    """Added to the variance in the norms."""

    def build(self, *, vision_width: int, text_width: int) -> BridgeConnector:
        """Build the connector between features and embeddings of these widths."""
        return BridgeConnector(vision_width, text_width, self)


class BridgeConnector(DeepStackConnector):
    """Projects the features, and those of further layers for the bridges.

    Shapes:
        values:  ``(tokens, vision_width)``, as many in each layer
        returns: ``(tokens, text_width)``, as many in each layer
    """

    def __init__(self, vision_width: int, text_width: int, config: BridgeConnectorConfig) -> None:
        stacked = DeepStackConnectorConfig(
            layers=config.layers, start=config.start, interval=config.interval, depth=1
        )
        super().__init__(vision_width, text_width, stacked)
        self.norms = nn.ModuleList(
            nn.LayerNorm(text_width, eps=config.eps) for _ in range(config.layers)
        )

    def places(self, num_layers: int) -> tuple[int, ...]:
        """Return the layers before which a bridge stands."""
        config = self.config
        return spread(config.layers, config.start, config.interval, num_layers, name="bridge")

    def inject(self, index: int, hidden: Tensor, seen: Seen) -> Tensor:
        """Join both sides at the placeholders."""
        if seen.features is None:
            return hidden
        values = seen.features.layers[index].values
        joined = self.norms[index](hidden + write_to_slots(hidden, seen.slots, values))
        return torch.where(seen.slots[..., None], joined, hidden)
