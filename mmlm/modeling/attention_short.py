"""Attention over many short segments of a packed row, all at once.

One call for each segment is the best way while segments are long. Where a row holds dozens of
short ones, as in fine-tuning on questions with short answers, the calls themselves cost most, on
a CPU above all in the backward pass. Here the segments are laid side by side, padded to the
longest, and two batched products do them all; the padding is computed in vain, so it pays only for
short ones. The gradient is written by hand: every token stands in one segment, so it is a gather
both ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

FEWEST_SEGMENTS = 4
MOST_TOKENS = 128
"""Longest segment, with what it goes on from. With 13 segments of 55 to 95 tokens, nine heads of
64, forward and backward took 23 ms instead of 37; with 40 of 18 to 32 tokens 9 ms instead of 27;
with four of 210 to 280 tokens it would take 59 ms instead of 35 (bf16, two cores, torch 2.15)."""

NARROWEST_HEAD = 32
"""Below this width separate calls are quicker where segments are not very short: the 13 segments
took 15 ms instead of 9 with four heads of 16, 18 instead of 9 with four of 8."""


class Layout(NamedTuple):
    """Where the segments of a row stand side by side.

    Shapes:
        queries: ``(segments, most_queries)``, the token in each place; padding repeats a token
        keys: ``(segments, most_keys)``, the tokens that a segment goes on from before its own
        seen: ``(segments, most_queries, most_keys)``, True where a query sees a key
        place_of_query: ``(tokens,)``, where each token stands in `queries`, flat
        place_of_key: ``(tokens,)``, where it stands in `keys` as a token of its own segment
        again, place_again: ``(shared,)``, tokens that a segment goes on from, and their places
    """

    queries: Tensor
    keys: Tensor
    seen: Tensor
    place_of_query: Tensor
    place_of_key: Tensor
    again: Tensor
    place_again: Tensor


def are_short(lengths: Sequence[int], seen_before: Tensor | None, head_width: int) -> bool:
    """Whether the segments of a row are many and short enough to be done at once."""
    if len(lengths) < FEWEST_SEGMENTS or max(lengths) > MOST_TOKENS or head_width < NARROWEST_HEAD:
        return False
    return seen_before is None or max(lengths) + int(seen_before[:, 1].max()) <= MOST_TOKENS


def lay_out(borders: Tensor, seen_before: Tensor | None) -> Layout:
    """Lay the segments of a row side by side.

    Args:
        borders: ``(segments + 1,)``, from 0 to the number of tokens.
        seen_before: ``(segments, 2)``, beginning and length of what each goes on from, or None.
    """
    borders = borders.long()
    lengths, starts = borders.diff(), borders[:-1]
    before = starts.new_zeros(len(starts), 2) if seen_before is None else seen_before.long()
    begin, count = before[:, :1], before[:, 1:]
    last = borders[-1] - 1
    row = torch.arange(int(lengths.max()), device=borders.device)
    column = torch.arange(int((lengths + count[:, 0]).max()), device=borders.device)
    queries = (starts[:, None] + row).minimum(last)
    own = starts[:, None] + column - count
    keys = torch.where(column < count, begin + column, own).clamp(min=0).minimum(last)
    seen = column[None, None] <= count[:, :, None] + row[None, :, None]
    token = torch.arange(int(borders[-1]), device=borders.device)
    segment = torch.bucketize(token, borders[1:], right=True)
    inside = token - starts[segment]
    shared = (column < count).nonzero()
    return Layout(
        queries,
        keys,
        seen,
        segment * len(row) + inside,
        segment * len(column) + inside + count[segment, 0],
        keys[shared[:, 0], shared[:, 1]],
        shared[:, 0] * len(column) + shared[:, 1],
    )


def short_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float | None
) -> Tensor:
    """Attend causally inside each segment, and to what it goes on from.

    Shapes:
        query: ``(1, heads, tokens, head_width)``
        key, value: ``(1, key_heads, tokens, head_width)``
        returns: ``(1, tokens, heads, head_width)``
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else value.dtype
    flat = [state[0].to(dtype).transpose(0, 1) for state in (query, key, value)]
    apply: Any = _SideBySide.apply
    return apply(*flat, layout, scale)[None]


class _SideBySide(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float
    ) -> Tensor:
        q, k, v = _side_by_side(query, key, value, layout)
        groups = q.shape[2] // layout.queries.shape[1]
        hidden = ~layout.seen.repeat(1, groups, 1)[:, None]
        scores = torch.matmul(q, k.transpose(2, 3)).float().mul_(scale)
        shares = scores.masked_fill_(hidden, float("-inf")).softmax(-1).to(q.dtype)
        ctx.save_for_backward(query, key, value, shares)
        ctx.layout, ctx.scale = layout, scale
        return _back(torch.matmul(shares, v), layout, query.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        query, key, value, shares = ctx.saved_tensors
        layout: Layout = ctx.layout
        q, k, v = _side_by_side(query, key, value, layout)
        given = _queries(gradients[0], layout, key.shape[1])
        given = given * _real(layout, given)
        of_v = torch.matmul(shares.transpose(2, 3), given)
        of_shares = torch.matmul(given, v.transpose(2, 3)).float()
        wide = shares.float()
        of_scores = wide * (of_shares - (of_shares * wide).sum(-1, keepdim=True))
        of_scores = of_scores.mul_(ctx.scale).to(q.dtype)
        of_q = _back(torch.matmul(of_scores, k), layout, query.shape)
        of_k = torch.matmul(of_scores.transpose(2, 3), q)
        return of_q, _keys_back(of_k, layout), _keys_back(of_v, layout), None, None


def _side_by_side(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    keys, values = (state[layout.keys].transpose(1, 2).contiguous() for state in (key, value))
    return _queries(query, layout, key.shape[1]), keys, values


def _queries(query: Tensor, layout: Layout, key_heads: int) -> Tensor:
    """Return ``(segments, key_heads, groups · most_queries, width)``."""
    segments, most = layout.queries.shape
    laid = query[layout.queries]
    laid = laid.view(segments, most, key_heads, -1, query.shape[-1]).permute(0, 2, 3, 1, 4)
    return laid.reshape(segments, key_heads, -1, query.shape[-1])


def _real(layout: Layout, like: Tensor) -> Tensor:
    """Return 1 where a query stands, 0 for padding: ``(segments, 1, groups · most, 1)``."""
    segments, most = layout.queries.shape
    real = like.new_zeros(segments * most)
    real[layout.place_of_query] = 1
    return real.view(segments, 1, most, 1).repeat(1, 1, like.shape[2] // most, 1)


def _back(laid: Tensor, layout: Layout, shape: torch.Size) -> Tensor:
    """Undo `_queries`: ``(tokens, heads, width)``."""
    segments, most = layout.queries.shape
    key_heads, width = laid.shape[1], laid.shape[-1]
    apart = laid.view(segments, key_heads, -1, most, width).permute(0, 3, 1, 2, 4)
    return apart.reshape(segments * most, *shape[1:])[layout.place_of_query]


def _keys_back(laid: Tensor, layout: Layout) -> Tensor:
    """Add up what the places of a token got: ``(tokens, key_heads, width)``."""
    flat = laid.transpose(1, 2).reshape(-1, laid.shape[1], laid.shape[-1])
    found = flat[layout.place_of_key]
    if len(layout.again):
        wide = found.float()
        wide.index_add_(0, layout.again, flat[layout.place_again].float())
        found = wide.to(laid.dtype)
    return found
