"""Ranks that wait for one another: what a rank does that has no picture to see.

Where gradients are added up or weights are gathered part by part, every rank must run every part
in each step. A rank with text alone sees an empty picture, and adds zero times what it saw.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def ranks_wait(model: nn.Module) -> bool:
    """Whether ranks wait for one another: then every rank runs the vision part each step."""
    return (
        model.training
        and torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


def nothing_seen(model: Any, device: torch.device) -> Tensor:
    """Run one empty picture and return zero: a rank with text alone must not hang others.

    Args:
        model: An `MMLMModel`.
        device: Where the text is.
    """
    facts, side = model.counter.facts, model.counter.side
    sizes = torch.tensor([side], device=device)
    shape = (model.counter.length(side),)
    if not model.counter.is_flat:
        shape = (*shape, facts.channels, *side)
    blank = torch.zeros(shape, device=device)
    features = model.get_image_features(blank, image_sizes=sizes)
    nothing = features.values.sum()
    # What is only read between the layers, or reads a question, must not idle either.
    if model.injection is not None or model.reads_question:
        nothing = nothing + sum(weight.sum() for weight in model.connector.parameters())
        nothing = nothing + sum(layer.values.sum() for layer in features.layers)
    return nothing * 0.0
