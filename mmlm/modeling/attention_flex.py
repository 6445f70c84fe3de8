"""FlexAttention with transformers' block mask, compiled on GPUs and as it stands on a CPU.

transformers compiles FlexAttention wherever it runs, which on a CPU takes half a minute and
then has no backward pass. Here a CPU runs it uncompiled, so that its forward pass can be
compared with the others; on a GPU it is compiled once for each process.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

FLEX = "mmlm_flex"


def block_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BlockMask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend where the block mask says.

    Shapes:
        query: ``(batch, heads, tokens, head_width)``
        key, value: ``(batch, key_heads, tokens, head_width)``, where `key_heads` divides `heads`
        returns: ``(batch, tokens, heads, head_width)``

    Raises:
        ValueError: for dropout or a mask that is no block mask, which FlexAttention does not take.
    """
    del kwargs
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    if dropout and module.training:
        raise ValueError("FlexAttention has no dropout. Use run.attention: auto.")
    if attention_mask is not None and not isinstance(attention_mask, BlockMask):
        raise ValueError("FlexAttention takes a block mask. Use run.attention: auto.")

    def capped(score: Tensor, *places: Tensor) -> Tensor:
        del places
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    run: Any = _compiled() if query.device.type != "cpu" else flex_attention
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without")
        output = run(
            query, key, value, score_mod=None if softcap is None else capped,
            block_mask=attention_mask, scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
    return output.transpose(1, 2).contiguous(), None


@cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


ALL_ATTENTION_FUNCTIONS.register(FLEX, block_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(FLEX, ALL_MASK_ATTENTION_FUNCTIONS["flex_attention"])
