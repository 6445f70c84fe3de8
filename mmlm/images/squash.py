"""The policy `squash`: the whole picture, resized to the encoder's side, proportions lost."""

from __future__ import annotations

from mmlm.features import Size
from mmlm.images.base import (
    ImagePlan,
    ImagePolicyConfig,
    Tile,
    image_policies,
    one_tile,
    whole,
)


@image_policies.register("squash")
class SquashConfig(ImagePolicyConfig):
    """Resize the whole picture to the encoder's side; a long picture is squeezed.

    Equals transformers' `SiglipImageProcessor`, and `CLIPImageProcessor` with a size of height
    and width and no centre crop.
    """

    def plan(self, size: Size, side: Size, step: int = 1) -> ImagePlan:
        """Plan one tile that holds everything."""
        return one_tile(Tile(box=whole(size), size=side))
