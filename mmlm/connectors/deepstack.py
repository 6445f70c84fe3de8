"""The connector `deepstack`: features of more layers are added inside the language model.

The placeholders get the projected features as with `mlp`. Features of further layers of the
encoder go through projectors of their own and are added to the hidden states at the same
placeholders, before one layer of the language model each. The tokens of the text stay as many.
(DeepStack, arXiv 2406.04334, stacks finer tiles so; Qwen3-VL stacks layers of the encoder.)
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn

from mmlm.connectors.activations import ActivationName
from mmlm.connectors.base import ConnectorConfig, connectors
from mmlm.connectors.groups import layers_of
from mmlm.connectors.injection import Injecting, Seen, spread, write_to_slots
from mmlm.connectors.mlp import MLPConnector, MLPConnectorConfig
from mmlm.features import VisionFeatures


@connectors.register("deepstack")
class DeepStackConnectorConfig(ConnectorConfig):
    """Add features of further encoder layers to the hidden states at the placeholders."""

    layers: int = Field(default=3, ge=1)
    """How many further layers of the encoder are read; as many as `vision.layers` names."""

    start: int = Field(default=1, ge=0)
    """The first layer of the language model before which features are added."""

    interval: int = Field(default=1, ge=1)
    """From one such layer to the next."""

    depth: int = Field(default=2, ge=1)
    """Number of linear layers of each projector."""

    activation: ActivationName = "gelu"
    """What stands between them, by its name in transformers."""

    def build(self, *, vision_width: int, text_width: int) -> DeepStackConnector:
        """Build the connector between features and embeddings of these widths."""
        return DeepStackConnector(vision_width, text_width, self)


class DeepStackConnector(Injecting):
    """Projects the features, and those of further layers for later.

    Shapes:
        values:  ``(tokens, vision_width)``, as many in each layer
        returns: ``(tokens, text_width)``, as many in each layer
    """

    def __init__(
        self, vision_width: int, text_width: int, config: DeepStackConnectorConfig
    ) -> None:
        super().__init__()
        self.config = config
        words = MLPConnectorConfig(depth=config.depth, activation=config.activation)
        projectors = [
            words.build(vision_width=vision_width, text_width=text_width)
            for _ in range(config.layers + 1)
        ]
        self.project, self.stack = projectors[0], nn.ModuleList(projectors[1:])

    def forward(self, features: VisionFeatures) -> VisionFeatures:
        """Project the features of each layer."""
        further = layers_of(features, self.config.layers)
        stacked = tuple(
            VisionFeatures(projector(layer).values, layer.grids)
            for projector, layer in zip(self.stack, further, strict=True)
        )
        first = self.project(features)
        return VisionFeatures(first.values, first.grids, layers=stacked)

    def places(self, num_layers: int) -> tuple[int, ...]:
        """Return the layers before which features are added."""
        config = self.config
        return spread(config.layers, config.start, config.interval, num_layers, name="deepstack")

    def inject(self, index: int, hidden: Tensor, seen: Seen) -> Tensor:
        """Add the features of one layer at the placeholders."""
        if seen.features is None:
            return hidden
        return hidden + write_to_slots(hidden, seen.slots, seen.features.layers[index].values)

    def last_linear(self) -> nn.Linear:
        """Return the last layer of the projector whose output the text reads."""
        assert isinstance(self.project, MLPConnector)
        return self.project.last_linear()
