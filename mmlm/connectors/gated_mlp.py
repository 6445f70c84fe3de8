"""The connector `gated_mlp`: one branch opens and closes the other (Shazeer 2020, 2002.05202).

In Idefics2 it stands before the Perceiver; alone it keeps every feature. Behind the reducer
`pixel_shuffle` it is the projector of Cohere2Vision (with bias) and of AyaVision (with a norm).
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn

from mmlm.connectors.activations import ActivationName, activation
from mmlm.connectors.base import Connector, ConnectorConfig, connectors
from mmlm.features import VisionFeatures


@connectors.register("gated_mlp")
class GatedMLPConnectorConfig(ConnectorConfig):
    """Project each feature by a gated MLP (SwiGLU, GEGLU, …).

    With `hidden_width` of the language model's feed-forward layers this is the
    `modality_projection` of Idefics2.
    """

    hidden_width: int | None = Field(default=None, ge=1)
    """Width of the two branches; by default four times the text width."""

    activation: ActivationName = "silu"
    """What the gate goes through: silu makes SwiGLU, gelu GEGLU, sigmoid a GLU."""

    bias: bool = False
    """Whether the layers have a bias."""

    norm: bool = False
    """Whether a layer norm stands before the branches (AyaVision)."""

    eps: float = Field(default=1e-6, gt=0)
    """Added to the variance in the norm."""

    def build(self, *, vision_width: int, text_width: int) -> GatedMLPConnector:
        """Build the connector between features and embeddings of these widths."""
        return GatedMLPConnector(
            GatedMLP(
                vision_width,
                self.hidden_width or 4 * text_width,
                text_width,
                activation_name=self.activation,
                bias=self.bias,
            ),
            nn.LayerNorm(vision_width, eps=self.eps) if self.norm else None,
        )


class GatedMLP(nn.Module):
    """``down(act(gate x) * up x)``.

    Shapes:
        values:  ``(…, width)``
        returns: ``(…, out_width)``
    """

    def __init__(
        self, width: int, hidden_width: int, out_width: int, *, activation_name: str, bias: bool
    ) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden_width, bias=bias)
        self.up = nn.Linear(width, hidden_width, bias=bias)
        self.down = nn.Linear(hidden_width, out_width, bias=bias)
        self.activation = activation(activation_name)

    def forward(self, values: Tensor) -> Tensor:
        """Apply the layers."""
        return self.down(self.activation(self.gate(values)) * self.up(values))


class GatedMLPConnector(Connector):
    """Projects each feature by itself.

    Shapes:
        values:  ``(tokens, vision_width)``
        returns: ``(tokens, text_width)``
    """

    def __init__(self, mlp: GatedMLP, norm: nn.LayerNorm | None = None) -> None:
        super().__init__()
        self.norm = norm
        self.mlp = mlp

    def forward(self, features: VisionFeatures) -> VisionFeatures:
        """Project each feature."""
        values = features.values if self.norm is None else self.norm(features.values)
        return features.with_values(self.mlp(values))

    def last_linear(self) -> nn.Linear:
        """Return the layer after the gate."""
        return self.mlp.down
