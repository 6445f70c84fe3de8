"""LookHere: each head of attention looks in one direction, and less at what is far.

The table of positions is emptied and stands still; where tokens are is told by what is added to
the scores instead (Fuller et al. 2024, arXiv 2405.13985). Heads are dealt to four directions in
turn and see the half of the picture that lies there; every fifth sees all of it. From a score the
distance in patches is taken, times a slope that halves from one round of heads to the next.
Prefix tokens see all and are seen by all. It holds at any size: nothing is resized.

The directions and slopes are our reading of the paper's idea, not its published weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmlm.errors import ConfigError
from mmlm.vision.base import VisionEncoder

LOOKHERE = "mmlm_lookhere"
_HOLDER = "_mmlm_looking"
_DIRECTIONS = ((-1, 0), (0, 1), (1, 0), (0, -1), None)
"""Up, right, down, left, and all round, as steps in rows and columns."""


class Looking:
    """Where the heads of one encoder look; the blocks of attention ask it for what they add.

    Args:
        encoder: An `hf` ViT; its tables of positions are emptied.
        blocks: Its blocks.

    Raises:
        ConfigError: if its attention cannot be told where to look.
    """

    def __init__(self, encoder: VisionEncoder, blocks: list[nn.Module]) -> None:
        tower: Any = getattr(encoder, "tower", None)
        if not getattr(tower, "_supports_attention_backend", False):
            raise ConfigError(
                "positions: lookhere needs a ViT of transformers with interchangeable attention, "
                "such as CLIP, SigLIP or DINOv2."
            )
        names = position_tables(encoder)
        if not names:
            raise ConfigError("positions: lookhere: this ViT has no table of positions to replace.")
        with torch.no_grad():
            for name, weight in encoder.named_parameters():
                if name in names:
                    weight.zero_()
                    weight.requires_grad_(False)
        self.tower = tower
        self._num_prefix = encoder.facts.num_prefix
        self._grid = (0, 0, 1)
        self._known: dict[tuple[int, ...], Tensor] = {}
        for block in blocks:
            for module in block.modules():
                object.__setattr__(module, _HOLDER, self)

    def at(self, rows: int, columns: int, maps: int) -> None:
        """Say which grid comes next."""
        self._grid = (rows, columns, maps)
        self.tower.config._attn_implementation = LOOKHERE

    def bias(self, query: Tensor) -> Tensor:
        """Return what is added to the scores of these queries ``(tiles, heads, tokens, width)``."""
        heads, tokens = query.shape[1], query.shape[2]
        rows, columns, _ = self._grid
        key = (heads, tokens, rows, columns)
        if key not in self._known:
            self._known[key] = looks(heads, rows, columns, tokens)
        return self._known[key].to(query)


def looks(heads: int, rows: int, columns: int, tokens: int) -> Tensor:
    """Return what is added to the scores: ``(heads, tokens, tokens)``.

    Args:
        heads: Heads of attention.
        rows: Of the grid.
        columns: Of the grid.
        tokens: All tokens: prefix, then one map or several of this grid.
    """
    each = rows * columns
    prefix = tokens % each
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()
    places = places.reshape(-1, 2).repeat(tokens // each, 1)
    steps = places[None, :] - places[:, None]  # from the query to the key
    distance = steps.norm(dim=-1)
    out = torch.zeros(heads, tokens, tokens)
    for head in range(heads):
        direction = _DIRECTIONS[head % len(_DIRECTIONS)]
        slope = 0.5 ** (head // len(_DIRECTIONS) + 1)
        values = -slope * distance
        if direction is not None:
            ahead = steps[..., 0] * direction[0] + steps[..., 1] * direction[1]
            values = values.masked_fill(ahead < 0, float("-inf"))
        out[head, prefix:, prefix:] = values
    return out


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attend where the heads look.

    Shapes:
        query, key, value: ``(tiles, heads, tokens, head_width)``
        returns: ``(tiles, tokens, heads, head_width)``
    """
    del attention_mask
    holder: Looking = getattr(module, _HOLDER)
    out = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=holder.bias(query), scale=kwargs.get("scaling"),
        dropout_p=kwargs.get("dropout", 0.0),
    )  # fmt: skip
    return out.transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(LOOKHERE, attend)


def position_tables(encoder: VisionEncoder) -> set[str]:
    """Name the parameters that are tables of positions."""
    return {
        name
        for name, _ in encoder.named_parameters()
        if any(word in name for word in ("position_embedding", "pos_embed"))
    }
