"""The policy `crop`: the middle of the picture, at its own proportions, the ends cut off."""

from __future__ import annotations

from pydantic import Field

from mmlm.features import Size
from mmlm.images.base import (
    ImagePlan,
    ImagePolicyConfig,
    Tile,
    image_policies,
    one_tile,
    whole,
)


@image_policies.register("crop")
class CropConfig(ImagePolicyConfig):
    """Resize until the picture covers the encoder's side, then cut the middle out.

    Equals transformers' `CLIPImageProcessor` with its centre crop, and, with `zoom` 256 / 224,
    the `BitImageProcessor` of DINOv2. What lies near the ends of a long picture is not seen.
    """

    zoom: float = Field(default=1.0, ge=1.0)
    """How much larger than the encoder's side the picture is resized before the cut."""

    def plan(self, size: Size, side: Size, step: int = 1) -> ImagePlan:
        """Plan one tile: a window in the middle of the resized picture."""
        least = Size(round(side.height * self.zoom), round(side.width * self.zoom))
        scaled = self._cover(size, least)
        top = (scaled.height - side.height) // 2
        left = (scaled.width - side.width) // 2
        return one_tile(Tile(box=whole(size), size=side, scaled=scaled, at=(top, left)))

    @staticmethod
    def _cover(size: Size, least: Size) -> Size:
        """Return the smallest size of these proportions that covers `least`, rounded down."""
        if least.width * size.height >= least.height * size.width:
            return Size(least.width * size.height // size.width, least.width)
        return Size(least.height, least.height * size.width // size.height)
