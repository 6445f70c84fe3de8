"""Attention over many short segments of a packed row, as few at once as pays.

One call for each segment is the best way while segments are long. Where a row holds dozens of
short ones, as in fine-tuning on questions with short answers, the calls themselves cost most, on
a CPU above all in the backward pass. Here segments of like length are laid side by side, padded
to the longest of them, and two batched products do them all; the padding is computed in vain, so
one long segment among short ones stays by itself. The gradient is written by hand: every token
stands in one segment, so it is a gather both ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

MOST_TOKENS = 128
"""Longest segment, with what it goes on from, that is laid beside others."""

NARROWEST_HEAD = 32
"""Below this width separate calls are quicker where segments are not very short: 13 segments of 75
tokens took 15 ms instead of 9 with four heads of 16, 18 instead of 9 with four of 8."""

_CALL = 13_000
"""What a separate call costs, forward and backward, counted in scores (of one query and one key):
about 0.4 ms, where a thousand scores take 0.03 ms either way (nine heads of 64, bf16, two cores,
torch 2.15). A group costs about three calls and the scores of its padding."""

_MOST_SEGMENTS = 256
"""In one group; a row of thousands would take long to part."""

Lengths = tuple[int, ...]


class Parts(NamedTuple):
    """The segments that are done together, and those that are left to separate calls."""

    groups: tuple[Lengths, ...]
    alone: Lengths


class Layout(NamedTuple):
    """Where some segments of a row stand side by side.

    Shapes:
        tokens: ``(tokens,)``, those of these segments
        queries: ``(segments, most_queries)``, the token in each place; padding repeats a token
        keys: ``(segments, most_keys)``, the tokens that a segment goes on from before its own
        seen: ``(segments, most_queries, most_keys)``, True where a query sees a key
        place_of_query: ``(tokens,)``, where each token stands in `queries`, flat
        place_of_key: ``(tokens,)``, where it stands in `keys` as a token of its own segment
        again, place_again: ``(shared,)``, tokens that a segment goes on from, and their places
    """

    tokens: Tensor
    queries: Tensor
    keys: Tensor
    seen: Tensor
    place_of_query: Tensor
    place_of_key: Tensor
    again: Tensor
    place_again: Tensor


@lru_cache(maxsize=64)
def part(lengths: Lengths, before: Lengths, *, heads: int, head_width: int) -> Parts:
    """Part the segments of a row into groups, so that all of it takes the least time.

    Args:
        lengths: Tokens of each segment.
        before: How many tokens each goes on from.
        heads: Heads of the queries.
        head_width: Their width.
    """
    reaches = [length + count for length, count in zip(lengths, before, strict=True)]
    short = [number for number, reach in enumerate(reaches) if reach <= MOST_TOKENS]
    if head_width < NARROWEST_HEAD:
        short = []
    order = sorted(short, key=lambda number: (lengths[number], reaches[number]))
    cost, begin = [0.0], [0]
    for end, last in enumerate(order, 1):
        cost.append(cost[-1] + _CALL + heads * lengths[last] * reaches[last])
        begin.append(end - 1)
        widest = reaches[last]
        for first in range(end - 2, max(-1, end - _MOST_SEGMENTS - 1), -1):
            widest = max(widest, reaches[order[first]])
            together = 3 * _CALL + heads * (end - first) * lengths[last] * widest
            if cost[first] + together < cost[end]:
                cost[end], begin[end] = cost[first] + together, first
    groups: list[Lengths] = []
    end = len(order)
    while end:
        groups.append(tuple(sorted(order[begin[end] : end])))
        end = begin[end]
    several = tuple(group for group in reversed(groups) if len(group) > 1)
    grouped = {number for group in several for number in group}
    return Parts(several, tuple(n for n in range(len(lengths)) if n not in grouped))


@lru_cache(maxsize=8)
def lay_out(
    lengths: Lengths, seen_before: tuple[Lengths, ...], chosen: Lengths, device: torch.device
) -> Layout:
    """Lay some segments of a row side by side.

    Args:
        lengths: Tokens of every segment of the row.
        seen_before: Beginning and length of what each goes on from.
        chosen: The numbers of those that are laid out, ascending.
        device: Where the row is.
    """
    with torch.inference_mode(mode=False):  # the next layer may be one that learns
        return _laid_out(
            torch.tensor(lengths, device=device),
            torch.tensor(seen_before, device=device),
            torch.tensor(chosen, device=device),
        )


def _laid_out(lengths: Tensor, seen_before: Tensor, chosen: Tensor) -> Layout:
    ends = lengths.cumsum(0)
    starts, last = (ends - lengths)[chosen], ends[-1] - 1
    own_length, (begin, count) = lengths[chosen], seen_before[chosen].split(1, dim=1)
    row = torch.arange(int(own_length.max()), device=lengths.device)
    column = torch.arange(int((own_length + count[:, 0]).max()), device=lengths.device)
    queries = (starts[:, None] + row).minimum(last)
    own = starts[:, None] + column - count
    keys = torch.where(column < count, begin + column, own).clamp(min=0).minimum(last)
    segment, inside = (row < own_length[:, None]).nonzero(as_tuple=True)
    shared = (column < count).nonzero()
    return Layout(
        starts[segment] + inside,
        queries,
        keys,
        column[None, None] <= count[:, :, None] + row[None, :, None],
        segment * len(row) + inside,
        segment * len(column) + inside + count[segment, 0],
        keys[shared[:, 0], shared[:, 1]],
        shared[:, 0] * len(column) + shared[:, 1],
    )


def short_attention(
    query: Tensor, key: Tensor, value: Tensor, layouts: Sequence[Layout], scaling: float | None
) -> Tensor:
    """Attend causally inside each segment, and to what it goes on from.

    Shapes:
        query: ``(1, heads, tokens, head_width)``
        key, value: ``(1, key_heads, tokens, head_width)``
        returns: ``(1, tokens, heads, head_width)``, of no meaning where no layout has a token
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else value.dtype
    flat = [state[0].to(dtype).transpose(0, 1) for state in (query, key, value)]
    apply: Any = _SideBySide.apply
    return apply(*flat, layouts, scale)[None]


class _SideBySide(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layouts: Sequence[Layout],
        scale: float,
    ) -> Tensor:
        output = query.new_empty(query.shape)
        all_shares: list[Tensor] = []
        for layout in layouts:
            q, k, v = _side_by_side(query, key, value, layout)
            groups = q.shape[2] // layout.queries.shape[1]
            hidden = ~layout.seen.repeat(1, groups, 1)[:, None]
            scores = torch.matmul(q, k.transpose(2, 3)).float().mul_(scale)
            shares = scores.masked_fill_(hidden, float("-inf")).softmax(-1).to(q.dtype)
            output[layout.tokens] = _back(torch.matmul(shares, v), layout, query.shape)
            all_shares.append(shares)
        ctx.save_for_backward(query, key, value, *all_shares)
        ctx.layouts, ctx.scale = layouts, scale
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        query, key, value, *all_shares = ctx.saved_tensors
        layouts: Sequence[Layout] = ctx.layouts
        of_query = torch.zeros_like(query, memory_format=torch.contiguous_format)
        of_keys: list[Tensor] = []
        of_values: list[Tensor] = []
        for layout, shares in zip(layouts, all_shares, strict=True):
            q, k, v = _side_by_side(query, key, value, layout)
            given = _queries(gradients[0], layout, key.shape[1])
            given = given * _real(layout, given)
            of_values.append(torch.matmul(shares.transpose(2, 3), given))
            of_shares = torch.matmul(given, v.transpose(2, 3)).float()
            wide = shares.float()
            of_shares.sub_(torch.linalg.vecdot(of_shares, wide)[..., None])
            of_scores = of_shares.mul_(wide).mul_(ctx.scale).to(q.dtype)
            of_query[layout.tokens] = _back(torch.matmul(of_scores, k), layout, query.shape)
            of_keys.append(torch.matmul(of_scores.transpose(2, 3), q))
        return (
            of_query,
            _keys_back(of_keys, layouts, key),
            _keys_back(of_values, layouts, value),
            None,
            None,
        )


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


def _keys_back(laid: Sequence[Tensor], layouts: Sequence[Layout], like: Tensor) -> Tensor:
    """Add up what the places of a token got: ``(tokens, key_heads, width)``."""
    again = any(len(layout.again) for layout in layouts)
    found = like.new_zeros(like.shape, dtype=torch.float32 if again else like.dtype)
    flat = [each.transpose(1, 2).reshape(-1, *like.shape[1:]).to(found.dtype) for each in laid]
    for each, layout in zip(flat, layouts, strict=True):
        found[layout.tokens] = each[layout.place_of_key]
    for each, layout in zip(flat, layouts, strict=True):
        if len(layout.again):
            found.index_add_(0, layout.again, each[layout.place_again])
    return found.to(like.dtype)
