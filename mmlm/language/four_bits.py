"""Linear layers held in 4 bits (NF4), through bitsandbytes.

    quantise          ordinary linear layers become 4-bit ones
    unpacked          and back, rounded once
    four_bit_layers   which layers below adapters are held so
    four_bit_state    the tensors that one weight becomes

The data type is that of QLoRA (Dettmers et al. 2023, arXiv 2305.14314).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from mmlm.errors import MissingExtraError

_FOUR_BITS = "Linear4bit"


def is_four_bit(layer: Any) -> bool:
    """Whether a linear layer is held in 4 bits."""
    return type(layer).__name__ == _FOUR_BITS


def quantise(model: Any, names: Sequence[str]) -> None:
    """Turn linear layers into 4-bit ones, in place; the same weights always give the same bits.

    Raises:
        MissingExtraError: if bitsandbytes is not installed.
    """
    for name in names:
        model.set_submodule(name, _in_four_bits(model.get_submodule(name)))


def four_bit_layers(model: Any) -> list[str]:
    """Return the names of the layers below adapters that are held in 4 bits."""
    return [
        name
        for name, module in model.named_modules()
        if hasattr(module, "base_layer") and is_four_bit(module.get_base_layer())
    ]


def four_bit_state(weight: Any) -> dict[str, Any]:
    """Return the tensors that a weight becomes in 4 bits, by their names beside `weight`.

    Raises:
        MissingExtraError: if bitsandbytes is not installed.
    """
    from torch import nn

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return dict(_in_four_bits(layer).state_dict())


def unpacked(base: Any) -> Any:
    """Return a copy of a linear layer, with 4-bit weights unpacked."""
    import copy

    import torch

    if not is_four_bit(base):
        return copy.deepcopy(base)
    bnb: Any = importlib.import_module("bitsandbytes.functional")

    base.state_dict()  # brings the weight back from a layout that one kernel of a CPU reads
    weight = bnb.dequantize_4bit(base.weight.data, base.weight.quant_state)
    plain = torch.nn.Linear(
        base.in_features, base.out_features, bias=base.bias is not None, device="meta"
    )
    plain.weight = torch.nn.Parameter(weight)
    plain.bias = base.bias
    return plain.train(base.training)


def compute_dtype(base: Any) -> Any:
    """Return the precision in which a layer computes; that of a 4-bit one stands beside it."""
    if is_four_bit(base):
        return base.compute_dtype or base.weight.quant_state.dtype
    return base.weight.dtype


def _in_four_bits(layer: Any) -> Any:
    bnb = load_bitsandbytes("A layer in 4 bits")
    fresh: Any = bnb.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=getattr(layer, "bias", None) is not None,
        compute_dtype=layer.weight.dtype,
        quant_type="nf4",
        device="meta",
    )
    fresh.weight = bnb.nn.Params4bit(
        layer.weight.detach().contiguous(), requires_grad=False, quant_type="nf4", module=fresh
    )
    fresh.bias = layer.bias
    fresh.train(layer.training)
    # On a CPU it would rearrange its weights at the first forward pass without gradients, in place:
    # that rounds their scales, and no gradient passes such a layer from then on.
    fresh.support_avx512bf16_for_cpu = False
    return fresh.to(layer.weight.device)  # moving is what quantises


def load_bitsandbytes(needed_for: str) -> Any:
    """Import bitsandbytes, whose 8 bits are used elsewhere.

    Raises:
        MissingExtraError: if it is not installed.
    """
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError:
        raise MissingExtraError("bitsandbytes", needed_for=needed_for, extra="qlora") from None
