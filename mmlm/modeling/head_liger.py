"""The head's loss by Liger's fused kernel (Hsu et al. 2024, arXiv 2410.10989), on a GPU.

The numbers are those of `head`, and so is the way: labelled positions alone, chunk by chunk,
gradients made in the same pass. Losses and the gradients of the logits are made in the memory of
the logits, by one Triton kernel, where PyTorch takes several and a float32 copy. `head` calls it
where the package is installed and the device has Triton; a factor on the logits it does not know.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from mmlm.language import HeadRule

_MODULE = "liger_kernel.ops.fused_linear_cross_entropy"
# Older releases cannot weigh positions in the same pass.
_NEEDED = {"token_grad_output", "compute_gradients", "weight_requires_grad"}


def missing(device: torch.device, rule: HeadRule) -> str | None:
    """Return why a loss is not computed by Liger's kernel, or None if it is."""
    if device.type != "cuda":
        return f"it runs on a CUDA device, and this is {device.type}"
    if rule.scale != 1.0:
        return "it knows no factor on the logits, and this model has one"
    return missing_package()


@cache
def missing_package() -> str | None:
    """Return why Liger's kernel cannot be called at all, or None."""
    if find_spec("liger_kernel") is None:
        return "liger-kernel is not installed (pip install 'liger-kernel>=0.8.5')"
    try:
        found = signature(_kernel())
    except (ImportError, AttributeError, RuntimeError) as error:
        return f"liger-kernel cannot be imported ({error})"
    if not set(found.parameters) >= _NEEDED:
        return "this liger-kernel cannot weigh positions (pip install -U 'liger-kernel>=0.8.5')"
    return None


def fused_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    weights: Tensor,
    rule: HeadRule,
    wants: list[bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the loss of each position, and the gradients of their weighted sum.

    Shapes:
        hidden: ``(positions, width)``, in the precision of the weight
        weight: ``(vocabulary, width)``
        targets: ``(positions,)``, no ignored values among them, at least one
        weights: ``(positions,)``, a factor for each position's loss
        returns: ``(positions,)`` in float32, unweighted

    Args:
        hidden: The last hidden states.
        weight: Of the head.
        bias: Of the head.
        targets: The tokens that are learnt.
        weights: On each loss.
        rule: What becomes of the logits; without a factor.
        wants: Whether hidden, weight and bias need a gradient.
    """
    losses, _, _, _, *gradients = _kernel()(
        hidden, weight, targets, bias=bias, reduction="none", softcap=rule.softcap,
        accum_dtype=torch.float32, token_grad_output=weights, compute_gradients=any(wants),
        weight_requires_grad=wants[1],
    )  # fmt: skip
    return losses, [one if want else None for one, want in zip(gradients, wants, strict=True)]


def _kernel() -> Any:
    return import_module(_MODULE).fused_linear_cross_entropy_forward
