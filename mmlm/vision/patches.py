"""No encoder at all: the pixels of each patch are its feature.

What turns them into something that a language model reads is the connector: with `linear`
this is Fuyu. The order inside a patch is row, column, channel, as in Fuyu's own weights.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mmlm.features import Size, VisionFeatures
from mmlm.vision.base import VisionConfig, VisionEncoder, VisionFacts, encoders


@encoders.register("patches")
class PatchesConfig(VisionConfig):
    """Raw patches of the picture; there are no weights to load."""

    patch_px: int = Field(default=16, ge=1)
    """Side of one patch, in pixels."""

    side_px: int = Field(default=224, ge=1)
    """Side of the picture, in pixels; a multiple of `patch_px`."""

    channels: int = Field(default=3, ge=1)
    """Channels of a pixel; other pictures than RGB are arrays."""

    resample: str = "bicubic"
    """How pictures are resized: bilinear, bicubic, lanczos or nearest-exact."""

    @model_validator(mode="after")
    def _whole_patches(self) -> Self:
        if self.side_px % self.patch_px:
            near = max(1, round(self.side_px / self.patch_px)) * self.patch_px
            raise ValueError(
                f"side_px {self.side_px} is not a multiple of patch_px {self.patch_px}; "
                f"take {near}, for example"
            )
        return self

    def facts(self) -> VisionFacts:
        """Return the facts, which follow from the settings alone."""
        rows = self.side_px // self.patch_px
        return VisionFacts(
            width=self.patch_px**2 * self.channels,
            side=(self.side_px, self.side_px),
            grid=(rows, rows),
            patch=self.patch_px,
            stride=self.patch_px,
            channels=self.channels,
            mean=(0.5,) * self.channels,
            std=(0.5,) * self.channels,
            resample=self.resample,
            rule="multiple",
            step=self.patch_px,
            feature="pixels",
        )

    def load(self, *, dtype: torch.dtype | None = None) -> PatchesEncoder:
        """Return the encoder; nothing is loaded."""
        return PatchesEncoder(self.facts())

    def build(self, facts: VisionFacts, tower_config: dict[str, Any] | None) -> PatchesEncoder:
        """Return the encoder; nothing is built."""
        return PatchesEncoder(facts)


class PatchesEncoder(VisionEncoder):
    """Cuts the picture into patches and hands their pixels on.

    Shapes:
        pixels:  ``(tiles, channels, height, width)``
        returns: values ``(tiles · rows · columns, patch · patch · channels)``
    """

    def forward(self, pixels: Tensor) -> VisionFeatures:
        """Cut the picture into patches."""
        tiles, channels, height, width = pixels.shape
        side = self.facts.stride
        grid = self.facts.out_grid(Size(height, width))
        cut = pixels.reshape(tiles, channels, grid.rows, side, grid.columns, side)
        values = cut.permute(0, 2, 4, 3, 5, 1).reshape(-1, side * side * channels)
        return VisionFeatures(values, (grid,) * tiles)
