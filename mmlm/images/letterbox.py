"""The policy `letterbox`: the whole picture at its own proportions, the rest filled."""

from __future__ import annotations

from mmlm.features import Size
from mmlm.images.base import ImagePlan, ImagePolicyConfig, Tile, image_policies, one_tile


@image_policies.register("letterbox")
class LetterboxConfig(ImagePolicyConfig):
    """Pad the picture to the encoder's proportions with its mean colour, then resize.

    Nothing is lost and nothing is squeezed. Equals transformers' `LlavaImageProcessor` with
    `do_pad` and no centre crop (LLaVA-1.5's `image_aspect_ratio: pad`).
    """

    def plan(self, size: Size, side: Size, step: int = 1) -> ImagePlan:
        """Plan one tile whose box is the smallest of the side's proportions around the picture."""
        height = max(size.height, _ceil_div(size.width * side.height, side.width))
        width = max(size.width, _ceil_div(size.height * side.width, side.height))
        top, left = (height - size.height) // 2, (width - size.width) // 2
        return one_tile(Tile(box=(-left, -top, width - left, height - top), size=side))


def _ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
