"""Tensors on their way into a GGUF file: what is a vector or a table is float32, the rest stays."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def add_tensor(writer: Any, name: str, value: Tensor, *, plain: bool = False) -> None:
    """Add one tensor without rounding it.

    Args:
        writer: A `gguf.GGUFWriter`.
        name: Its name in llama.cpp.
        value: The tensor; vectors are written in float32, as llama.cpp wants them.
        plain: Write a matrix in float32 too (positions, kernels of convolutions).
    """
    import gguf

    value = value.detach().cpu().contiguous()
    if value.dtype == torch.bfloat16 and value.ndim > 1 and not plain:
        kind = gguf.GGMLQuantizationType.BF16
        data: Any = gguf.quants.quantize(value.float().numpy(), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
        return
    if value.ndim < 2 or plain or value.dtype != torch.float16:
        value = value.float()
    writer.add_tensor(name, value.numpy())
