"""The connector `mlp`: linear layers with an activation between them (LLaVA-1.5 and most since)."""

from __future__ import annotations

from pydantic import Field
from torch import nn

from mmlm.connectors.activations import ActivationName, activation
from mmlm.connectors.base import Connector, ConnectorConfig, connectors
from mmlm.features import VisionFeatures


@connectors.register("mlp")
class MLPConnectorConfig(ConnectorConfig):
    """Project each feature by a stack of linear layers.

    Depth 2 with GELU and bias is the projector of `LlavaForConditionalGeneration` and
    `FastVlmForConditionalGeneration`. For one with norms or other widths see `norm_mlp`.
    """

    depth: int = Field(default=2, ge=1)
    """Number of linear layers; all but the first map the text width onto itself."""

    activation: ActivationName = "gelu"
    """What stands between the layers, by its name in transformers: gelu, relu, silu, tanh, …"""

    bias: bool = True
    """Whether the layers have a bias."""

    def build(self, *, vision_width: int, text_width: int) -> MLPConnector:
        """Build the connector between features and embeddings of these widths."""
        return MLPConnector(
            vision_width,
            text_width,
            depth=self.depth,
            activation_name=self.activation,
            bias=self.bias,
        )


class LayerStack(Connector):
    """Projects each feature by itself, through `layers` that end in a linear one.

    Shapes:
        values:  ``(tokens, vision_width)``
        returns: ``(tokens, text_width)``
    """

    layers: nn.Sequential

    def forward(self, features: VisionFeatures) -> VisionFeatures:
        """Project each feature."""
        return features.with_values(self.layers(features.values))

    def last_linear(self) -> nn.Linear:
        """Return the last layer of the stack."""
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        return last


class MLPConnector(LayerStack):
    """Linear layers of the text's width with an activation between them."""

    def __init__(
        self,
        vision_width: int,
        text_width: int,
        *,
        depth: int,
        activation_name: str = "gelu",
        bias: bool = True,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(vision_width, text_width, bias=bias)]
        for _ in range(depth - 1):
            layers += [activation(activation_name), nn.Linear(text_width, text_width, bias=bias)]
        self.layers = nn.Sequential(*layers)
