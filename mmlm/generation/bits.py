"""Holding a language model in 4 or 8 bits, to answer with less memory.

4 bits are NF4 of QLoRA (arXiv 2305.14314), 8 bits are LLM.int8() (arXiv 2208.07339); both come
from bitsandbytes. Only the linear layers of the language model are packed, which is where the
memory is; embedding, head, connector and encoder stay as they are. Answers differ a little from
those of the whole weights.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from mmlm.errors import ConfigError
from mmlm.language.four_bits import load_bitsandbytes, quantise

_LANGUAGE = "model.language."
KNOWN = (4, 8)


def hold_in_bits(model: Any, bits: int) -> int:
    """Pack the linear layers of the language model, in place; returns how many were packed.

    Raises:
        ConfigError: if so many bits are not offered, or no layer can be packed.
        MissingExtraError: if bitsandbytes is not installed.
    """
    if bits not in KNOWN:
        raise ConfigError(f"bits must be 4 or 8 (got {bits}).")
    library = load_bitsandbytes("Loading in 4 or 8 bits")
    names = [
        name
        for name, layer in model.named_modules()
        if name.startswith(_LANGUAGE) and type(layer) is nn.Linear
    ]
    if not names:
        raise ConfigError(
            "This language model has no plain linear layers that could be held in fewer bits "
            "(a model with adapters must be merged first). Load it without `bits`."
        )
    if bits == 4:
        quantise(model, names)
    else:
        for name in names:
            model.set_submodule(name, _in_eight(library, model.get_submodule(name)))
    return len(names)


def _in_eight(library: Any, layer: nn.Linear) -> Any:
    fresh: Any = library.nn.Linear8bitLt(
        layer.in_features, layer.out_features, bias=getattr(layer, "bias", None) is not None,
        has_fp16_weights=False, threshold=6.0, device="meta",
    )  # fmt: skip
    fresh.weight = library.nn.Int8Params(
        layer.weight.detach().contiguous(), requires_grad=False, has_fp16_weights=False
    )
    fresh.bias = layer.bias
    fresh.train(layer.training)
    return fresh.to(layer.weight.device)  # moving is what packs
