"""The connector `ep_alm`: one token of a picture, renewed inside the language model.

A picture is one placeholder. It begins as the projected summary of the encoder's features; before
later layers of the language model, the hidden state that stands there is replaced by the summary
of a further layer of the encoder. The summary is the CLS token, or the mean where there is none.
One linear map serves all layers (eP-ALM, arXiv 2303.11403, which learns it and a few prompts).
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from mmlm.connectors.base import ConnectorConfig, connectors
from mmlm.connectors.groups import layers_of
from mmlm.connectors.injection import Injecting, Seen, spread, write_to_slots
from mmlm.features import Grid, VisionFeatures


@connectors.register("ep_alm")
class EPALMConnectorConfig(ConnectorConfig):
    """Show a picture as one token, which layers of the encoder renew inside the LLM."""

    layers: int = Field(default=5, ge=1)
    """How many further layers of the encoder are read; as many as `vision.layers` names."""

    start: int = Field(default=1, ge=0)
    """The first layer of the language model before which the token is replaced."""

    interval: int = Field(default=1, ge=1)
    """From one such layer to the next."""

    shared: bool = True
    """Whether one map serves all layers, or each has its own."""

    def out_grid(self, grid: Grid) -> Grid:
        """Return one token."""
        return Grid(1, 1, 1)

    def build(self, *, vision_width: int, text_width: int) -> EPALMConnector:
        """Build the connector between features and embeddings of these widths."""
        return EPALMConnector(vision_width, text_width, self)


class EPALMConnector(Injecting):
    """Projects the summary of a picture, and those of further layers for later.

    Shapes:
        values:  ``(tokens, vision_width)``
        returns: ``(items, text_width)``, as many in each layer
    """

    def __init__(self, vision_width: int, text_width: int, config: EPALMConnectorConfig) -> None:
        super().__init__()
        self.config = config
        count = 1 if config.shared else config.layers + 1
        self.maps = nn.ModuleList(nn.Linear(vision_width, text_width) for _ in range(count))

    def forward(self, features: VisionFeatures) -> VisionFeatures:
        """Project one summary for each item and layer."""
        grids = (Grid(1, 1, 1),) * len(features.grids)
        kinds = [features, *layers_of(features, self.config.layers)]
        first, *more = (
            VisionFeatures(self.maps[0 if self.config.shared else index](summary(kind)), grids)
            for index, kind in enumerate(kinds)
        )
        return VisionFeatures(first.values, grids, layers=tuple(more))

    def places(self, num_layers: int) -> tuple[int, ...]:
        """Return the layers before which the token is replaced."""
        config = self.config
        return spread(config.layers, config.start, config.interval, num_layers, name="ep_alm")

    def inject(self, index: int, hidden: Tensor, seen: Seen) -> Tensor:
        """Replace the hidden state at each placeholder."""
        if seen.features is None:
            return hidden
        renewed = write_to_slots(hidden, seen.slots, seen.features.layers[index].values)
        return torch.where(seen.slots[..., None], renewed, hidden)

    def last_linear(self) -> nn.Linear:
        """Return the map of the token that the text reads first."""
        first = self.maps[0]
        assert isinstance(first, nn.Linear)
        return first


def summary(features: VisionFeatures) -> Tensor:
    """Return the CLS token of each item, or the mean of its features: ``(items, width)``."""
    if features.prefix is not None and features.prefix.shape[1]:
        return features.prefix[:, 0]
    return torch.stack([item.mean(0) for item in features.items()])
