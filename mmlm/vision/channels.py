"""Encoders for pictures of other channels than they were trained on.

The kernel of the first layer is averaged over its channels and spread over the new ones, scaled
so that a grey picture gives what it gave before. What the channels mean is then learnt.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from mmlm.errors import ConfigError
from mmlm.vision import hf_facts


def for_channels(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Return one value for each channel; other numbers of channels than known get the average."""
    if len(values) == channels:
        return values
    return (sum(values) / len(values),) * channels


def spread(kernel: Tensor, shape: torch.Size) -> Tensor:
    """Spread a kernel ``(out, channels, …)`` over other channels; what differs else stays."""
    others = kernel.shape[:1] + kernel.shape[2:]
    if kernel.ndim < 3 or kernel.shape == shape or others != shape[:1] + shape[2:]:
        return kernel
    share = kernel.shape[1] / shape[1]
    return (kernel.float().mean(1, keepdim=True) * share).to(kernel.dtype).expand(shape).clone()


def with_channels(tower: PreTrainedModel, channels: int) -> PreTrainedModel:
    """Return a tower of transformers for pictures of `channels` channels.

    Raises:
        ConfigError: if the family has no such choice, or its stem is no convolution.
    """
    values: dict[str, Any] = tower.config.to_dict()
    if "num_channels" not in values:
        raise ConfigError(
            f"vision.channels {channels}: a {tower.config.model_type} has three channels alone. "
            f"Name another encoder, or one of timm."
        )
    values["num_channels"] = channels
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    other: Any = hf_facts.new_tower(config)
    wanted = other.state_dict()
    state = {
        name: spread(weight, wanted[name].shape) for name, weight in tower.state_dict().items()
    }
    wrong = [name for name, weight in state.items() if weight.shape != wanted[name].shape]
    if wrong:
        raise ConfigError(
            f"vision.channels {channels}: {wrong[0]} of this {tower.config.model_type} cannot be "
            f"spread over them. Name another encoder."
        )
    other.load_state_dict(state)
    return other.to(tower.dtype).eval()
