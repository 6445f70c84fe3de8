"""The encoder of Qwen2.5-VL at the picture's own proportions, for any language model.

The stock tower takes the patches of all pictures in one row, cut and ordered by its own image
processor: squares of neighbours stand together, because its last layer merges them into one
feature each (Bai et al. 2025, arXiv 2502.13923). Here tiles are cut so; what comes out is the
merged features, row after row, and nothing of the language model's positions in three axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from mmlm.errors import ConfigError
from mmlm.features import Size, VisionFeatures
from mmlm.vision.base import VisionEncoder, VisionFacts
from mmlm.vision.hf_facts import OF_PATCHES, PixelFacts

MODEL_TYPES = OF_PATCHES

SIDE_CELLS = 16
"""Rows and columns of features at the side that is taken where none is named."""


def facts_of(config: PretrainedConfig, side_px: int | None, pixels: PixelFacts) -> VisionFacts:
    """Return what is known of a tower from its config.

    Raises:
        ConfigError: if the side is no multiple of the square that becomes one feature.
    """
    values: Any = config
    patch, merge = int(values.patch_size), int(values.spatial_merge_size)
    step = patch * merge
    side = side_px or SIDE_CELLS * step
    if side % step:
        raise ConfigError(
            f"vision.side_px {side} is not a multiple of {step}, the square of {merge} x {merge} "
            f"patches that becomes one feature; take {max(1, round(side / step)) * step}."
        )
    return VisionFacts(
        width=values.out_hidden_size,
        side=(side, side),
        grid=(side // step, side // step),
        patch=patch,
        stride=step,
        channels=values.in_channels,
        mean=pixels.mean,
        std=pixels.std,
        resample=pixels.resample,
        rule="multiple",
        step=step,
        feature="merged",
    )


class QwenVitEncoder(VisionEncoder):
    """Runs the tower of Qwen2.5-VL on tiles of any sizes.

    Args:
        tower: A `Qwen2_5_VisionTransformerPretrainedModel`.
        facts: What is known about it.

    Shapes:
        pixels:  ``(tiles, channels, height, width)``, normalised; see also `encode_tiles`
        returns: values ``(Σ rows · columns, out_hidden_size)``
    """

    packs_tiles: ClassVar[bool] = True

    def __init__(self, tower: PreTrainedModel, facts: VisionFacts) -> None:
        super().__init__(facts)
        self.tower = tower

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
        values: Any = self.tower.config
        patch, merge = int(values.patch_size), int(values.spatial_merge_size)
        grids = tuple(self.facts.out_grid(Size(*tile.shape[-2:])) for tile in tiles)
        patches = [
            patches_of(tile, patch, merge, int(values.temporal_patch_size)) for tile in tiles
        ]
        rows = [[1, grid.rows * merge, grid.columns * merge] for grid in grids]
        joined = torch.cat(patches).to(self.tower.dtype)
        places = torch.tensor(rows, device=joined.device)
        return VisionFeatures(self.tower(joined, grid_thw=places).pooler_output, grids)


def patches_of(tile: Tensor, side: int, merge: int, frames: int) -> Tensor:
    """Cut a tile into patches, those of one square together, each shown as `frames` frames.

    Shapes:
        tile:    ``(channels, height, width)``
        returns: ``(patches, channels · frames · side · side)``
    """
    channels, height, width = tile.shape
    rows, columns = height // (side * merge), width // (side * merge)
    cut = tile.reshape(channels, rows, merge, side, columns, merge, side)
    cut = cut.permute(1, 4, 2, 5, 0, 3, 6)[..., None, :, :]
    still = cut.expand(*cut.shape[:5], frames, side, side)
    return still.reshape(-1, channels * frames * side * side)
