"""Feature dropout: whole channels of the encoder's features are left out while a stage learns.

The language model is to learn from pictures of which the connector is as unsure as it will be
of pictures that it has never seen. A connector that has seen the training pictures is sure of
every one of them; without some of its channels it is not. For each item (a tile) the share that
is left out is drawn anew, the same channels at every place of it (spatial dropout, Tompson et
al. 2015, arXiv 1411.4280), and what stays is scaled so that the mean stays.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmlm.features import VisionFeatures


@contextmanager
def channel_dropout(connector: nn.Module, most: float) -> Generator[None]:
    """Leave out channels before the connector, wherever gradients are computed.

    Args:
        connector: Gets the features.
        most: The largest share; that of an item is drawn between 0 and it. 0 does nothing.
    """
    if not most:
        yield
        return

    def drop(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        del module
        features: Any = given[0]
        if not torch.is_grad_enabled() or not isinstance(features, VisionFeatures):
            return None
        return (features.with_values(thinned(features, most)), *given[1:])

    hook = connector.register_forward_pre_hook(drop)
    try:
        yield
    finally:
        hook.remove()


def thinned(features: VisionFeatures, most: float) -> Tensor:
    """Return the values with channels left out.

    Shapes:
        returns: ``(tokens, width)``
    """
    values = features.values
    counts = torch.tensor([grid.num_tokens for grid in features.grids], device=values.device)
    share = torch.rand(len(counts), 1, device=values.device) * most
    kept = torch.rand(len(counts), values.shape[1], device=values.device) >= share
    factors = (kept / (1 - share)).to(values.dtype)
    return values * factors.repeat_interleave(counts, dim=0)
