"""SigLIP 2 of flexible resolution (NaFlex) at the picture's own proportions, without padding.

The stock tower takes patches padded to the longest picture of the batch. Here the patches of all
tiles stand in one row; only attention is kept inside each tile, segment by segment. The result is
that of the stock tower on each picture alone; padding is never computed. Whatever works on a
patch alone (embedding, norms, MLPs) runs once over the row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmlm.errors import ConfigError
from mmlm.features import Grid, Size, VisionFeatures
from mmlm.vision.base import VisionEncoder, VisionFacts
from mmlm.vision.probe import idle_parameters

MODEL_TYPES = ("siglip2_vision_model",)
"""Towers that take patches instead of pixels."""

IN_TILES = "mmlm_picture_segments"
_BORDERS = "mmlm_lengths"


def attend_in_tiles(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attend inside each tile; tiles of one length go through together.

    Shapes:
        query, key, value: ``(1, heads, tokens, head_width)``
        returns: ``(1, tokens, heads, head_width)``
    """
    lengths: Sequence[int] = getattr(module, _BORDERS)
    pieces = [each[0].split(lengths, dim=1) for each in (query, key, value)]
    same: dict[int, list[int]] = defaultdict(list)
    for index, length in enumerate(lengths):
        same[length].append(index)
    done: dict[int, Tensor] = {}
    for members in same.values():
        q, k, v = (torch.stack([piece[index] for index in members]) for piece in pieces)
        out = functional.scaled_dot_product_attention(
            q, k, v, scale=kwargs.get("scaling"), dropout_p=kwargs.get("dropout", 0.0)
        )
        done |= dict(zip(members, out, strict=True))
    joined = torch.cat([done[index] for index in range(len(lengths))], dim=1)
    return joined.transpose(0, 1)[None], None


ALL_ATTENTION_FUNCTIONS.register(IN_TILES, attend_in_tiles)


class NaflexEncoder(VisionEncoder):
    """Runs a SigLIP 2 tower on tiles of any sizes.

    Args:
        tower: A `Siglip2VisionModel`.
        facts: What is known about it.
        layer: Which hidden state; `last` is after the final norm.
        layers: Further ones.

    Shapes:
        pixels:  ``(tiles, channels, height, width)``, normalised; see also `encode_tiles`
        returns: values ``(Σ rows · columns, width)``
    """

    packs_tiles: ClassVar[bool] = True

    def __init__(
        self,
        tower: PreTrainedModel,
        facts: VisionFacts,
        *,
        layer: int | Literal["last"],
        layers: tuple[int, ...] = (),
    ) -> None:
        super().__init__(facts)
        self.tower = tower
        self._layers = (layer, *layers)

    @property
    def tower_config(self) -> dict[str, Any]:
        """The tower's config as transformers writes it."""
        config: PretrainedConfig = self.tower.config
        return config.to_dict()

    def forward(self, pixels: Tensor) -> VisionFeatures:
        """Encode tiles of one size."""
        return self.encode_tiles(list(pixels))

    def encode_tiles(self, tiles: Sequence[Tensor]) -> VisionFeatures:
        """Encode tiles of any sizes in one row."""
        grids = tuple(self.facts.out_grid(Size(*tile.shape[-2:])) for tile in tiles)
        states = run_packed(self.tower, tiles, grids, self._layers)
        first, *more = (VisionFeatures(state, grids) for state in states)
        return replace(first, layers=tuple(more))

    def idle_parameters(self) -> frozenset[str]:
        """Name the parameters after the last hidden state that is used."""
        shape = (1, self.facts.channels, *self.facts.side)
        grid = self.facts.out_grid(self.facts.side_size)

        def used(tower: Any, pixels: Tensor) -> Tensor:
            states = run_packed(tower, list(pixels), (grid,) * len(pixels), self._layers)
            return torch.cat([state.flatten() for state in states])

        return frozenset(f"tower.{name}" for name in idle_parameters(self.tower, used, shape))


def run_packed(
    tower: Any,
    tiles: Sequence[Tensor],
    grids: Sequence[Grid],
    layers: Sequence[int | Literal["last"]],
) -> list[Tensor]:
    """Return hidden states of tiles in one row: ``(Σ rows · columns, width)`` each.

    Raises:
        ConfigError: if a layer is beyond the tower.
    """
    embeddings, blocks = tower.embeddings, tower.encoder.layers
    count = len(blocks) + 1
    for layer in layers:
        if layer != "last" and not -count <= layer < count:
            raise ConfigError(
                f"vision.layer {layer} is beyond this tower, which has {count} hidden states: from "
                f"{-count} to {count - 1}, or 'last'."
            )
    patch = embeddings.patch_size
    patches = torch.cat([patches_of(tile, patch) for tile in tiles])
    weight = embeddings.patch_embedding.weight
    places = _positions(embeddings, grids)
    hidden = embeddings.patch_embedding(patches.to(weight.dtype)) + places
    tower.config._attn_implementation = IN_TILES
    states = [hidden]
    for block in blocks:
        setattr(block.self_attn, _BORDERS, [grid.num_tokens for grid in grids])
        hidden = block(hidden[None] if hidden.ndim == 2 else hidden, None)
        states.append(hidden[0])
    return [
        tower.post_layernorm(states[-1]) if layer == "last" else states[layer] for layer in layers
    ]


def patches_of(tile: Tensor, side: int) -> Tensor:
    """Cut ``(channels, height, width)`` into ``(patches, side · side · channels)``.

    Inside a patch the order is row, column, channel, as in SigLIP 2 and Fuyu.
    """
    channels, height, width = tile.shape
    cut = tile.reshape(channels, height // side, side, width // side, side)
    return cut.permute(1, 3, 2, 4, 0).reshape(-1, side * side * channels)


def _positions(embeddings: Any, grids: Sequence[Grid]) -> Tensor:
    """Return the position of each patch: the table resized to each grid once."""
    side = embeddings.position_embedding_size
    table = embeddings.position_embedding.weight.reshape(side, side, -1)
    known: dict[Grid, Tensor] = {}
    for grid in grids:
        if grid not in known:
            shape = torch.tensor([[grid.rows, grid.columns]])
            known[grid] = embeddings.resize_positional_embeddings(table, shape, grid.num_tokens)[0]
    return torch.cat([known[grid] for grid in grids])
