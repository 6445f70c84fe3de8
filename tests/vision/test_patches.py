"""Raw patches: the definition as loops, and the order that stock Fuyu uses."""

from __future__ import annotations

import pytest
import torch

from mmlm.errors import ConfigError
from mmlm.features import Grid
from mmlm.vision import PatchesConfig


def test_patches_agree_with_their_definition():
    encoder = PatchesConfig(patch_px=4, side_px=12).load()
    pixels = torch.randn(2, 3, 12, 8)
    out = encoder(pixels)
    assert out.grids == (Grid(1, 3, 2),) * 2
    place = 0
    for tile in range(2):
        for row in range(3):
            for column in range(2):
                block = pixels[tile, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
                wanted = [
                    float(block[channel, y, x])
                    for y in range(4)
                    for x in range(4)
                    for channel in range(3)
                ]
                assert out.values[place].tolist() == wanted
                place += 1


def test_patches_are_in_the_order_of_fuyu():
    from transformers import FuyuImageProcessor

    processor = FuyuImageProcessor(patch_size={"height": 4, "width": 4})
    pixels = torch.randn(1, 3, 12, 8)
    theirs = processor.patchify_image(pixels)
    assert torch.equal(PatchesConfig(patch_px=4, side_px=12).load()(pixels).values, theirs[0])


def test_a_side_that_cuts_a_patch_is_refused_with_one_that_fits():
    with pytest.raises(
        ConfigError, match=r"side_px 225 is not a multiple of patch_px 16; take 224"
    ):
        PatchesConfig.from_dict({"side_px": 225})
