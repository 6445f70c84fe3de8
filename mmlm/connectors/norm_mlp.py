"""The connector `norm_mlp`: an MLP with layer norms, and layers of any width.

Behind the reducer `pixel_shuffle` this is the projector of a family of models:

    InternVL 1.5-3.5    factor 2, one norm, two layers of the text width
    NVILA               factor 2 with `pad`, the same layers
    NVILA 3x3           factor 3 with `pad`, two norms, hidden widths [3c, d]
    NVILA-S2 3x3        factor 3 with `pad`, four norms, hidden widths [3c, c, c/3, d]
    LFM2-VL             factor 2, one norm or none, one hidden width of its own
    Gemma 3             behind `average_pool`: one RMS norm, one layer without bias

where c is the width of the features before they are stacked and d that of the language model.
Idefics3 and SmolVLM need no MLP: `pixel_shuffle` and `linear` without bias.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, Self

from pydantic import Field, model_validator
from torch import nn

from mmlm.connectors.activations import ActivationName, activation
from mmlm.connectors.base import ConnectorConfig, connectors
from mmlm.connectors.mlp import LayerStack


@connectors.register("norm_mlp")
class NormMLPConnectorConfig(ConnectorConfig):
    """Project each feature by layer norms and linear layers (InternVL, NVILA, LFM2-VL).

    The default is InternVL's: a layer norm, then two linear layers with GELU between them.
    """

    depth: int | None = Field(default=None, ge=1)
    """Number of linear layers; by default 2, or what follows from `hidden_widths`."""

    hidden_widths: tuple[int, ...] | None = None
    """Widths after each layer but the last; by default the text width everywhere."""

    norms: int = Field(default=1, ge=0)
    """Before how many of the layers, from the first on, a layer norm stands."""

    activation: ActivationName = "gelu"
    """What stands between the layers, by its name in transformers: gelu, relu, silu, tanh, …"""

    bias: bool = True
    """Whether the linear layers have a bias."""

    norm: Literal["layer", "rms"] = "layer"
    """Which norm: with mean and bias, or by the root of the mean square alone."""

    eps: float = Field(default=1e-5, gt=0)
    """Added to the variance in the norms."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        widths = self.hidden_widths
        if widths is not None and self.depth not in (None, len(widths) + 1):
            raise ValueError(
                f"depth {self.depth} and {len(widths)} hidden_widths do not fit: there is one "
                f"hidden width less than layers; leave depth out"
            )
        if any(width < 1 for width in widths or ()):
            raise ValueError("every one of hidden_widths must be at least 1")
        if self.norms > self.num_layers:
            raise ValueError(f"norms {self.norms} exceeds the {self.num_layers} layers; lower it")
        return self

    @property
    def num_layers(self) -> int:
        """The number of linear layers."""
        return (self.depth or 2) if self.hidden_widths is None else len(self.hidden_widths) + 1

    def build(self, *, vision_width: int, text_width: int) -> NormMLPConnector:
        """Build the connector between features and embeddings of these widths."""
        hidden = self.hidden_widths
        widths = [text_width] * (self.num_layers - 1) if hidden is None else list(hidden)
        return NormMLPConnector([vision_width, *widths, text_width], self)


class NormMLPConnector(LayerStack):
    """Linear layers of any width, the first of them behind a norm."""

    def __init__(self, widths: list[int], config: NormMLPConnectorConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index, (width, following) in enumerate(pairwise(widths)):
            if index:
                layers.append(activation(config.activation))
            if index < config.norms:
                kind = nn.LayerNorm if config.norm == "layer" else nn.RMSNorm
                layers.append(kind(width, eps=config.eps))
            layers.append(nn.Linear(width, following, bias=config.bias))
        self.layers = nn.Sequential(*layers)
