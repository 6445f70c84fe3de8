"""Starting a connector at the scale of the language model's own embeddings.

Fresh weights give vectors that are several times larger or smaller than those of words, and
the first hundred steps of training go into mending that. This changes weights once, before
training, and leaves the architecture as it is, so that a stock class stays a stock class.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmlm.connectors.base import Connector
from mmlm.errors import ConfigError
from mmlm.features import VisionFeatures


@torch.no_grad()
def match_scale(connector: Connector, features: VisionFeatures, target: float | Tensor) -> float:
    """Rescale the last layer so that the output's standard deviation is that of the embeddings.

    Args:
        connector: The connector; its weights are changed in place.
        features: What the encoder and the reducer gave for some pictures of the training data.
        target: The standard deviation to reach, or the embedding matrix whose own is taken.

    Returns:
        The factor by which the last layer was multiplied; 1 for a connector that sets its
        scale in no last layer (one that ends in a norm).

    Raises:
        ConfigError: if the output does not vary at all, or the target is not above zero.
    """
    last = connector.last_linear()
    if last is None:
        return 1.0
    wanted = float(target.float().std()) if isinstance(target, Tensor) else target
    got = float(connector(features).values.float().std())
    if not wanted > 0 or not got > 0:
        raise ConfigError(
            f"The scale of the connector cannot be matched: its output has a standard deviation "
            f"of {got:g}, the embeddings of {wanted:g}. Both must be above zero; give features "
            f"of real pictures and a trained language model."
        )
    factor = wanted / got
    last.weight.mul_(factor)
    if isinstance(last.bias, nn.Parameter):
        last.bias.mul_(factor)
    return factor
