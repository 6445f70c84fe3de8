"""The connector `linear`: one matrix (the first LLaVA, PaliGemma, Fuyu)."""

from __future__ import annotations

from torch import nn

from mmlm.connectors.base import Connector, ConnectorConfig, connectors
from mmlm.features import VisionFeatures


@connectors.register("linear")
class LinearConnectorConfig(ConnectorConfig):
    """Project each feature by one matrix."""

    bias: bool = True
    """Whether a bias is added."""

    def build(self, *, vision_width: int, text_width: int) -> LinearConnector:
        """Build the connector between features and embeddings of these widths."""
        return LinearConnector(vision_width, text_width, bias=self.bias)


class LinearConnector(Connector):
    """Projects each feature by itself.

    Shapes:
        values:  ``(tokens, vision_width)``
        returns: ``(tokens, text_width)``
    """

    def __init__(self, vision_width: int, text_width: int, *, bias: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(vision_width, text_width, bias=bias)

    def forward(self, features: VisionFeatures) -> VisionFeatures:
        """Project each feature."""
        return features.with_values(self.linear(features.values))

    def last_linear(self) -> nn.Linear:
        """Return the one layer."""
        return self.linear
