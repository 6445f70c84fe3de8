"""The useful FLOPs of a step: what the model's answer to it cannot do without.

A weight of a linear layer costs two operations for each token that passes it, forward; backward
costs the same once where only the gradient passes, and twice where the weight learns as well.
Causal attention costs half of its square. The head counts the positions that are learnt, for no
other reaches it. Padding, activations that are computed twice, and a feature that comes from the
cache count nothing: MFU is what is left of the machine's rate for learning. The kernels of a
convolution count once for each token of the last grid, which is less than they cost.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Costs:
    """What one model costs in one stage, in FLOPs.

    Args:
        token: For each token of the language model, but for attention.
        square: For each square of a sample's length.
        label: For each position that is learnt.
        tile: For each tile that the encoder sees.
        feature: For each feature that the connector reads.
        features_of_tile: How many features a tile has before the reducer.
    """

    token: float
    square: float
    label: float
    tile: float
    feature: float
    features_of_tile: int

    def of(self, samples: Iterable[Any], *, encoded: int) -> float:
        """Return the FLOPs of planned samples, `encoded` tiles of which the encoder has to see."""
        total = self.tile * encoded
        for sample in samples:
            length = sample.num_tokens
            total += self.token * length + self.square * length**2 + self.label * sample.num_labels
            total += self.feature * self.features_of_tile * sample.num_tiles
        return total


def costs_of(model: Any) -> Costs:
    """Count the costs of a model, as its parameters say what learns."""
    parts = model.model
    text = model.config.text_config
    language, head = _weights(parts.language), model.lm_head.weight
    learns_below = _learns(parts.vision) or _learns(parts.connector) or _learns(parts.language)
    heads = int(getattr(text, "num_attention_heads", 1))
    head_width = int(getattr(text, "head_dim", 0) or text.hidden_size // heads)
    layers = int(text.num_hidden_layers)
    passes = _passes(language, gradient_passes=learns_below)
    grid = parts.counter.facts.out_grid(parts.counter.side)
    vision = _weights(parts.vision)
    connector = _weights(parts.connector)
    per_patch = _passes(vision, gradient_passes=False)
    width = int(getattr(parts.counter.facts, "width", 0))
    tower_layers = int(getattr(parts.counter.facts, "num_layers", 0) or _depth(parts.vision))
    backward = 3 if _learns(parts.vision) else 1
    attention = 4.0 * grid.num_tokens**2 * width * tower_layers * backward
    return Costs(
        token=passes,
        square=2.0 * heads * head_width * layers * (3 if learns_below else 1),
        label=2.0 * head.numel() * (1 + learns_below + bool(head.requires_grad)),
        tile=per_patch * grid.num_tokens + attention,
        feature=_passes(connector, gradient_passes=_learns(parts.vision)),
        features_of_tile=grid.num_tokens,
    )


def _passes(weights: list[tuple[float, bool]], *, gradient_passes: bool) -> float:
    """Return the FLOPs of one token: forward, and backward where it is needed."""
    needed = gradient_passes or any(learns for _, learns in weights)
    return sum(2.0 * count * (1 + needed + learns) for count, learns in weights)


def _weights(module: nn.Module) -> list[tuple[float, bool]]:
    """Return the number of weights of each matrix that a token passes, and whether it learns."""
    found: list[tuple[float, bool]] = []
    embeddings = {id(child.weight) for child in module.modules() if isinstance(child, nn.Embedding)}
    share = _active_share(module)
    for name, parameter in module.named_parameters():
        if parameter.ndim < 2 or id(parameter) in embeddings or "position" in name:
            continue
        # Two weights of 4 bits share a byte.
        size = parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)
        found.append((size * (share if "experts" in name else 1.0), parameter.requires_grad))
    return found


def _active_share(module: nn.Module) -> float:
    """Return the share of the experts that one token passes; 1 where there are none."""
    config = getattr(module, "config", None)
    chosen = getattr(config, "num_experts_per_tok", None)
    every = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    return chosen / every if chosen and every else 1.0


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _depth(module: nn.Module) -> int:
    lists = [len(child) for child in module.modules() if isinstance(child, nn.ModuleList)]
    return max(lists, default=0)
