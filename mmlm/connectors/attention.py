"""Attention for connectors: queries read from a context, through PyTorch's fused kernel.

One class serves the Perceiver, the Q-Former, ladders and ordered queries. How its weights begin
is chosen here too: normal, or *mimetic* (Trockman and Kolter 2023, arXiv 2305.09828), in which
every query finds its own place and what is read is first subtracted, as in trained networks.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

Initialisation = Literal["normal", "mimetic"]
"""How the weights of attention begin."""

STD = 0.02
"""Standard deviation of weights that begin as normal numbers, as in BERT, ViT and BLIP-2."""


def check_heads(width: int, heads: int) -> None:
    """Refuse a number of heads that does not divide the width.

    Raises:
        ValueError: for pydantic, which names the part of the recipe.
    """
    if width % heads:
        raise ValueError(f"heads {heads} does not divide the width {width}")


class Attention(nn.Module):
    """Multi-head attention of queries over a context.

    Args:
        width: Width of the queries and of what comes out.
        context_width: Width of the context.
        heads: Number of heads.
        head_width: Width of one head; by default the width divided by the heads.
        key_heads: Number of key and value heads, which divides `heads`; by default as many.
        bias: Whether the layers have a bias.

    Shapes:
        queries: ``(batch, queries, width)``
        context: ``(batch, tokens, context_width)``
        returns: ``(batch, queries, width)``
    """

    def __init__(
        self,
        width: int,
        context_width: int,
        *,
        heads: int,
        head_width: int | None = None,
        key_heads: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.key_heads = key_heads or heads
        self.head_width = head_width or width // heads
        self.query = nn.Linear(width, heads * self.head_width, bias=bias)
        self.key = nn.Linear(context_width, self.key_heads * self.head_width, bias=bias)
        self.value = nn.Linear(context_width, self.key_heads * self.head_width, bias=bias)
        self.out = nn.Linear(heads * self.head_width, width, bias=bias)

    def forward(
        self,
        queries: Tensor,
        context: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Let every query read from the context.

        Args:
            queries: ``(batch, queries, width)``
            context: ``(batch, tokens, context_width)``
            mask: ``(batch, 1, queries, tokens)`` or broadcastable, True = may be read.
            causal: Whether query i reads only the first i + 1 of the context.
        """
        read = scaled_dot_product_attention(
            self.query(queries).unflatten(-1, (self.heads, -1)).transpose(1, 2),
            self.key(context).unflatten(-1, (self.key_heads, -1)).transpose(1, 2),
            self.value(context).unflatten(-1, (self.key_heads, -1)).transpose(1, 2),
            attn_mask=mask,
            is_causal=causal,
            enable_gqa=self.heads != self.key_heads,
        )
        return self.out(read.transpose(1, 2).flatten(2))


def normal_(module: nn.Module, std: float = STD) -> None:
    """Draw the weights of all linear layers below from a normal distribution; no bias is left."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=std)
            if isinstance(layer.bias, nn.Parameter):
                nn.init.zeros_(layer.bias)


@torch.no_grad()
def mimetic_(
    attention: Attention,
    *,
    noise: tuple[float, float] = (0.7, 0.4),
    identity: tuple[float, float] = (0.7, 0.4),
) -> None:
    """Begin as attention ends up in trained networks (Trockman and Kolter 2023, section 4).

    For every head the product of query and key is near ``+identity[0] · I`` and the product of
    value and output, over all heads, near ``-identity[1] · I``, each beside ``noise`` times a
    Gaussian matrix of variance 1/width, and cut to the rank of the layers by singular values.

    Args:
        attention: Where queries and context have the same width; changed in place.
        noise: The factors of the Gaussian parts.
        identity: The factors of the identities.
    """
    width = attention.query.in_features
    if attention.key.in_features != width or attention.key_heads != attention.heads:
        raise ValueError("mimetic initialisation needs one width and as many key heads as heads")
    if attention.query.weight.is_meta:
        return  # built without contents; a checkpoint fills it
    heads, rank = attention.heads, min(width, attention.head_width)
    for head in range(heads):
        rows = slice(head * attention.head_width, head * attention.head_width + rank)
        left, right = _factors(noise[0] * _gaussian(width) + identity[0] * torch.eye(width))
        attention.query.weight[rows] = left[:, :rank].T.to(attention.query.weight)
        attention.key.weight[rows] = right[:, :rank].T.to(attention.key.weight)
    left, right = _factors(noise[1] * _gaussian(width) - identity[1] * torch.eye(width))
    rank = min(width, heads * attention.head_width)
    attention.value.weight[:rank] = left[:, :rank].T.to(attention.value.weight)
    attention.out.weight.zero_()
    attention.out.weight[:, :rank] = right[:, :rank].to(attention.out.weight)
    for layer in (attention.query, attention.key, attention.value, attention.out):
        if isinstance(layer.bias, nn.Parameter):
            nn.init.zeros_(layer.bias)


def _gaussian(width: int) -> Tensor:
    return torch.randn(width, width, device="cpu") / width**0.5


def _factors(product: Tensor) -> tuple[Tensor, Tensor]:
    """Split a matrix into two, so that ``left @ right.T`` is the matrix, the strongest first."""
    left, strengths, right = torch.linalg.svd(product)
    roots = strengths.sqrt()
    return left * roots, right.T * roots
