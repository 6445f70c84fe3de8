"""Attention that keeps the samples of a packed row apart.

A backend of our own is filed under transformers' attention interface: `mmlm_segments`.
Where a row holds several samples it runs one causal attention for each of them, or one for many
short ones of like length, so no block mask is built and nothing is computed across a border.
Where a batch is padded (there are no segment borders) it is transformers' own SDPA, mask
included. All backends stand in `mmlm.modeling.backends`; which of them a run uses is decided in
`mmlm.training`.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmlm.modeling.attention_short import Lengths, Parts, lay_out, part, short_attention

SEGMENTS = "mmlm_segments"
_borders_given: ContextVar[bool] = ContextVar("borders_given", default=False)


@contextmanager
def borders_given(given: bool) -> Generator[None]:
    """Say that the attention called inside gets the borders of a packed row, and no mask."""
    token = _borders_given.set(given)
    try:
        yield
    finally:
        _borders_given.reset(token)


def mask_where_needed(*args: Any, **kwargs: Any) -> Tensor | None:
    """Make SDPA's mask, but for rows whose borders say everything that a mask would."""
    if _borders_given.get():
        return None
    return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    sliding_window: int | None = None,
    seen_before: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend causally inside each segment of the one row.

    A segment may go on from an earlier stretch of the row, as questions about one picture do: it
    sees all of that stretch, as if it stood right behind it.

    Shapes:
        query: ``(1, heads, tokens, head_width)``
        key, value: ``(1, key_heads, tokens, head_width)``, where `key_heads` divides `heads`
        cu_seq_lens_q: ``(segments + 1,)``, the borders, from 0 to `tokens`
        seen_before: ``(segments, 2)``, beginning and length of what each goes on from
        returns: ``(1, tokens, heads, head_width)``
    """
    if cu_seq_lens_q is None or query.shape[2] != key.shape[2]:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            sliding_window=sliding_window, **kwargs,
        )  # fmt: skip
    lengths = tuple(cu_seq_lens_q.diff().tolist())
    earlier = ((0, 0),) * len(lengths)
    if seen_before is not None:
        earlier = tuple(map(tuple, seen_before.tolist()))
    parts = Parts((), tuple(range(len(lengths))))
    if not dropout and sliding_window is None and query.device.type == "cpu":
        before = tuple(count for _, count in earlier)
        parts = part(lengths, before, heads=query.shape[1], head_width=query.shape[-1])
    together: Tensor | None = None
    if parts.groups:
        layouts = [lay_out(lengths, earlier, group, query.device) for group in parts.groups]
        together = short_attention(query, key, value, layouts, scaling)
        if not parts.alone:
            return together, None
    grouped = query.shape[1] != key.shape[1]
    split = [state.split(lengths, dim=2) for state in (query, key, value)]
    outputs: dict[int, Tensor] = {}
    for number in parts.alone:
        q, k, v = (states[number] for states in split)
        start, count = earlier[number]
        if count:
            k = torch.cat([key[:, :, start : start + count], k], dim=2)
            v = torch.cat([value[:, :, start : start + count], v], dim=2)
        mask = _window_mask(q, sliding_window, count)
        outputs[number] = scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=grouped,
        ).transpose(1, 2)
    return _in_order(outputs, together, lengths).contiguous(), None


def _in_order(outputs: dict[int, Tensor], together: Tensor | None, lengths: Lengths) -> Tensor:
    """Put the segments that were done alone between those that were done together."""
    if together is None:
        return torch.cat(list(outputs.values()), dim=1)
    borders = [0, *accumulate(lengths)]
    pieces: list[Tensor] = []
    done = 0
    for number, output in outputs.items():
        pieces += [together[:, done : borders[number]], output]
        done = borders[number + 1]
    return torch.cat([*pieces, together[:, done:]], dim=1)


def _window_mask(query: Tensor, window: int | None, before: int = 0) -> Tensor | None:
    """Return the mask of a sliding window, or of a segment that goes on from `before` tokens.

    None where being causal is all there is to say.
    """
    tokens = query.shape[2]
    slides = window is not None and before + tokens > window
    if not before and not slides:
        return None
    ones = torch.ones(tokens, before + tokens, dtype=torch.bool, device=query.device)
    mask = ones.tril(before)
    return mask & ~ones.tril(before - window) if slides and window is not None else mask


ALL_ATTENTION_FUNCTIONS.register(SEGMENTS, segment_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(SEGMENTS, mask_where_needed)
