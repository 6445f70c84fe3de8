"""Packed rows through PyTorch's own varlen attention: a flash kernel with nothing to install.

`torch.nn.attention.varlen` has kernels for CUDA alone, in half precision. Where a batch is
padded (there are no segment borders), or the model reads on in a cache, it is transformers'
SDPA. The function has changed its signature from version to version; what is not there is
written out here.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmlm.modeling.attention import mask_where_needed

VARLEN = "mmlm_varlen"


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend causally inside each segment of the one row, in one kernel.

    Shapes:
        query: ``(1, heads, tokens, head_width)``
        key, value: ``(1, key_heads, tokens, head_width)``, where `key_heads` divides `heads`
        cu_seq_lens_q: ``(segments + 1,)``, the borders, from 0 to `tokens`
        returns: ``(1, tokens, heads, head_width)``

    Raises:
        NotImplementedError: for soft-capped scores and dropout, which the kernel has not.
    """
    if cu_seq_lens_q is None or query.shape[2] != key.shape[2]:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            sliding_window=sliding_window, **kwargs,
        )  # fmt: skip
    if softcap is not None or dropout:
        raise NotImplementedError("varlen attention has neither soft caps nor dropout")
    borders = cu_seq_lens_q.to(torch.int32)
    longest = max_length_q or int(borders.diff().max())
    half = query.dtype if query.dtype != torch.float32 else value.dtype
    if half == torch.float32 and torch.is_autocast_enabled(query.device.type):
        half = torch.get_autocast_dtype(query.device.type)
    query, key, value = (state[0].transpose(0, 1).to(half) for state in (query, key, value))
    output = call_varlen(query, key, value, borders, longest, scale=scaling, window=sliding_window)
    return output.unsqueeze(0), None


def call_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: Tensor,
    longest: int,
    *,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Call the function of this version of PyTorch.

    Shapes:
        query: ``(tokens, heads, head_width)``
        key, value: ``(tokens, key_heads, head_width)``
        returns: ``(tokens, heads, head_width)``
    """
    from torch.nn.attention.varlen import varlen_attn

    takes = _parameters()
    options: dict[str, Any] = {}
    if scale is not None and "scale" in takes:
        options["scale"] = scale
    elif scale is not None:
        query = query * (scale * query.shape[-1] ** 0.5)
    if key.shape[1] != query.shape[1]:
        if "enable_gqa" in takes:
            options["enable_gqa"] = True
        else:
            times = query.shape[1] // key.shape[1]
            key, value = (state.repeat_interleave(times, dim=1) for state in (key, value))
    if "window_size" in takes:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    elif window is not None:
        raise NotImplementedError("this version of varlen attention has no sliding window")
    else:
        options["is_causal"] = True
    call: Any = varlen_attn
    return call(query, key, value, borders, borders, longest, longest, **options)


@cache
def _parameters() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


ALL_ATTENTION_FUNCTIONS.register(VARLEN, varlen_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(VARLEN, mask_where_needed)
