"""The activations that a connector may name; the names are those of transformers.

So that a setting of a recipe can be written into the config of a stock class as it stands.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator
from torch import Tensor, nn
from torch.nn import functional


class QuickGELU(nn.Module):
    """The approximation of GELU by a sigmoid that CLIP was trained with."""

    def forward(self, values: Tensor) -> Tensor:
        """Return ``x · sigmoid(1.702 x)``."""
        return values * (1.702 * values).sigmoid()


class SquaredReLU(nn.Module):
    """ReLU squared (So et al. 2021, Primer; Flamingo's feed-forward layers)."""

    def forward(self, values: Tensor) -> Tensor:
        """Return ``max(x, 0)²``."""
        return functional.relu(values).square()


class TanhGELU(nn.GELU):
    """The approximation of GELU by a tanh."""

    def __init__(self) -> None:
        super().__init__(approximate="tanh")


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_pytorch_tanh": TanhGELU,
    "leaky_relu": nn.LeakyReLU,
    "mish": nn.Mish,
    "quick_gelu": QuickGELU,
    "relu": nn.ReLU,
    "relu2": SquaredReLU,
    "relu6": nn.ReLU6,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


def _known(name: str) -> str:
    if name not in ACTIVATIONS:
        raise ValueError(f"no such activation; known: {', '.join(ACTIVATIONS)}")
    return name


ActivationName = Annotated[str, AfterValidator(_known)]
"""A name in `ACTIVATIONS`, checked when the config is read."""


def activation(name: str) -> nn.Module:
    """Build the activation of this name."""
    return ACTIVATIONS[name]()
