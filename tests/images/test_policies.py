"""The policies plan what transformers' image processors do, and `cut` gives the same bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmlm.features import Size
from mmlm.images import (
    CropConfig,
    LetterboxConfig,
    SquashConfig,
    cut_all,
    image_policies,
    mean_fill,
    normalise,
    resize,
)
from mmlm.images.base import Tile
from mmlm.images.resize import cut

SIZES = [
    (37, 53),
    (224, 224),
    (500, 31),
    (13, 700),
    (301, 200),
    (1, 50),
    (50, 1),
    (1, 1),
    (480, 640),
]
SIDES = st.integers(1, 30_000)


def noise(height: int, width: int) -> Image.Image:
    values = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3))
    return Image.fromarray(values.astype(np.uint8))


def ours(policy, image: Image.Image, side: int, theirs) -> torch.Tensor:
    """What our policy gives under the settings of one of their processors."""
    plan = policy.plan(Size(image.height, image.width), Size(side, side))
    resample = {2: "bilinear", 3: "bicubic"}[int(theirs.resample)]
    tiles = cut_all(image, plan.tiles, resample=resample, fill=mean_fill(theirs.image_mean))
    return normalise(tiles, theirs.image_mean, theirs.image_std)


def assert_same_pixels(policy, theirs, side: int) -> None:
    # The same kernels on the same bytes in the same order: equal to the last bit.
    for height, width in SIZES:
        image = noise(height, width)
        wanted = theirs(image, return_tensors="pt")["pixel_values"]
        got = ours(policy, image, side, theirs)
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("resample", [2, 3], ids=["bilinear", "bicubic"])
def test_squash_equals_clip_without_its_crop_to_the_last_bit(resample):
    pytest.importorskip("torchvision")
    from transformers import CLIPImageProcessor

    size = {"height": 48, "width": 48}
    theirs = CLIPImageProcessor(do_center_crop=False, size=size, resample=resample)
    assert_same_pixels(SquashConfig(), theirs, 48)


def test_squash_equals_siglip_to_the_last_bit():
    pytest.importorskip("torchvision")
    from transformers import SiglipImageProcessor

    assert_same_pixels(SquashConfig(), SiglipImageProcessor(size={"height": 48, "width": 48}), 48)


def test_letterbox_equals_llava_with_its_padding_to_the_last_bit():
    pytest.importorskip("torchvision")
    from transformers import LlavaImageProcessor

    size = {"height": 48, "width": 48}
    theirs = LlavaImageProcessor(do_pad=True, do_center_crop=False, size=size)
    assert_same_pixels(LetterboxConfig(), theirs, 48)


def test_crop_equals_clip_to_the_last_bit():
    pytest.importorskip("torchvision")
    from transformers import CLIPImageProcessor

    theirs = CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    assert_same_pixels(CropConfig(), theirs, 48)


def test_crop_with_zoom_equals_the_processor_of_dinov2_to_the_last_bit():
    pytest.importorskip("torchvision")
    from transformers import BitImageProcessor

    theirs = BitImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56})
    assert_same_pixels(CropConfig(zoom=64 / 56), theirs, 56)


@pytest.mark.parametrize("resample", ["bilinear", "bicubic", "nearest-exact"])
@pytest.mark.parametrize("size", [(48, 64), (301, 200), (20, 333), (7, 5)])
def test_rows_then_columns_in_strips_is_what_one_pass_gives(size, resample, monkeypatch):
    tile = Tile((0, 0, size[1], size[0]), Size(24, 40))
    at_once = cut(noise(*size), tile, resample=resample)
    monkeypatch.setattr(resize, "_STRIP_PIXELS", 100)
    assert torch.equal(cut(noise(*size), tile, resample=resample), at_once)


@pytest.mark.parametrize("size", [(31, 77), (300, 200), (5, 900)])
def test_lanczos_is_pillows_own_where_pytorch_has_none(size, monkeypatch):
    image = noise(*size)
    tile = Tile((0, 0, image.width, image.height), Size(48, 40))
    with_torch = cut(image, tile, resample="lanczos") if resize._torch_has_lanczos() else None
    monkeypatch.setattr(resize, "_torch_has_lanczos", lambda: False)
    got = cut(image, tile, resample="lanczos")
    wanted = np.array(image.resize((40, 48), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    assert np.array_equal(got.numpy(), wanted)
    monkeypatch.setattr(resize, "_STRIP_PIXELS", 100)
    assert torch.equal(cut(image, tile, resample="lanczos"), got)
    if with_torch is not None:
        torch.testing.assert_close(got, with_torch, rtol=0, atol=1)
        wide = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
        by_torch = torch.nn.functional.interpolate(
            wide[None], size=(48, 40), mode="lanczos", antialias=True
        )[0].clamp(0, 255)
        floats = resize._lanczos_by_pillow(wide, Size(48, 40))
        torch.testing.assert_close(floats, by_torch, rtol=0, atol=0.01)


def test_normalising_leaves_the_pixels_as_they_were():
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    window = torch.from_numpy(np.array(noise(30, 40))).permute(2, 0, 1)[:, 3:20, 5:30]
    for pixels in (window, window.float(), window.float().contiguous()):
        before = pixels.clone()
        got = normalise(pixels, mean, std)
        assert torch.equal(pixels, before)
        for channel in range(3):
            offset, scale = (torch.tensor(value[channel]) * 255 for value in (mean, std))
            assert torch.equal(got[channel], (before[channel].float() - offset) / scale)


def test_letterbox_of_a_strip_equals_the_padded_square():
    # The definition, written out: pad first, resize then. In strips it must give the same bytes.
    image = noise(3, 5000)
    canvas = Image.new("RGB", (5000, 5000), (10, 20, 30))
    canvas.paste(image, (0, (5000 - 3) // 2))
    tile = LetterboxConfig().plan(Size(3, 5000), Size(32, 32)).tiles[0]
    got = cut(image, tile, resample="bicubic", fill=(10, 20, 30))
    wanted = cut(canvas, Tile((0, 0, 5000, 5000), Size(32, 32)), resample="bicubic")
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1)], ids=str)
@pytest.mark.parametrize(
    "policy", [SquashConfig(), LetterboxConfig(), CropConfig()], ids=lambda p: p.use
)
def test_a_strip_of_20_000_pixels_is_cut_in_little_memory(policy, size, monkeypatch):
    held: list[int] = []
    interpolate = resize._interpolate

    def counted(pixels, wanted, resample):
        held.append(max(pixels.numel(), 3 * wanted.height * wanted.width))
        return interpolate(pixels, wanted, resample)

    monkeypatch.setattr(resize, "_interpolate", counted)
    image = Image.new("RGB", (size[1], size[0]), (200, 100, 50))
    tiles = cut_all(image, policy.plan(Size(*size), Size(64, 64)).tiles, fill=(1, 2, 3))
    assert tiles.shape == (1, 3, 64, 64)
    assert max(held) < 60 * 2**20  # the padded square would hold 1.2 GB


def test_cut_takes_windows_inside_and_outside_the_resized_box():
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    whole = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    inside = Tile((0, 0, 4, 4), Size(2, 2), scaled=Size(4, 4), at=(1, 2))
    assert torch.equal(cut(image, inside), whole[:, 1:3, 2:4])
    beyond = cut(
        image, Tile((0, 0, 4, 4), Size(3, 3), scaled=Size(4, 4), at=(-1, 2)), fill=(9, 9, 9)
    )
    assert (beyond[:, 0] == 9).all()
    assert (beyond[:, :, 2] == 9).all()
    assert torch.equal(beyond[:, 1:, :2], whole[:, :2, 2:4])
    nowhere = cut(image, Tile((10, 10, 14, 14), Size(2, 2)), fill=(1, 2, 3))
    assert nowhere[:, 0, 0].tolist() == [1, 2, 3]


@settings(max_examples=300, deadline=None)
@given(height=SIDES, width=SIDES, side_height=st.integers(1, 1024), side_width=st.integers(1, 1024))
def test_letterbox_holds_the_whole_picture_in_the_smallest_box(
    height, width, side_height, side_width
):
    tile = LetterboxConfig().plan(Size(height, width), Size(side_height, side_width)).tiles[0]
    left, top, right, bottom = tile.box
    assert left <= 0
    assert top <= 0
    assert right >= width
    assert bottom >= height
    # One direction fits exactly, and the other has the side's proportions to within a pixel.
    assert (right - left == width) or (bottom - top == height)
    assert 0 <= (bottom - top) * side_width - (right - left) * side_height < max(
        side_width, side_height
    ) or (
        0
        <= (right - left) * side_height - (bottom - top) * side_width
        < max(side_width, side_height)
    )
    assert abs((right - width) + left) <= 1
    assert abs((bottom - height) + top) <= 1


@settings(max_examples=300, deadline=None)
@given(height=SIDES, width=SIDES, side_px=st.integers(1, 1024), zoom=st.floats(1, 2))
def test_crop_takes_its_window_from_inside(height, width, side_px, zoom):
    tile = CropConfig(zoom=zoom).plan(Size(height, width), Size(side_px, side_px)).tiles[0]
    assert tile.scaled is not None
    top, left = tile.at
    assert 0 <= top <= tile.scaled.height - side_px
    assert 0 <= left <= tile.scaled.width - side_px


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 400),
    width=st.integers(1, 400),
    side=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    policy=st.sampled_from([SquashConfig(), LetterboxConfig(), CropConfig(), CropConfig(zoom=1.3)]),
)
def test_every_tile_has_the_size_that_was_planned(height, width, side, policy):
    image = Image.new("RGB", (width, height), (7, 77, 177))
    plan = policy.plan(Size(height, width), Size(*side))
    tiles = cut_all(image, plan.tiles, fill=(7, 77, 177))
    assert tiles.shape == (1, 3, *side)
    # A picture of one colour stays of one colour, fill included.
    assert (tiles.amax((0, 2, 3)) - tiles.amin((0, 2, 3)) == 0).all()


@pytest.mark.parametrize("most", [1, 2, 5, 11, 40])
@pytest.mark.parametrize("rule", ["smart", "fit", "long_side"])
def test_a_small_budget_keeps_the_proportions_of_a_picture(rule, most):
    words = {"use": "native", "rule": rule, "max_tokens": most, "min_tokens": 1}
    policy = image_policies.read(words, origin="image")
    for size in (Size(300, 200), Size(1000, 900), Size(200, 300)):
        ((height, width),) = [tile.size for tile in policy.plan(size, Size(32, 32), 8).tiles]
        assert height // 8 * (width // 8) <= most
        # Both sides are whole cells, rounded down or up by less than one.
        assert (height - 8) * size.width < (width + 8) * size.height
        assert (width - 8) * size.height < (height + 8) * size.width
    if rule != "smart":  # the least number of cells belongs to `smart` alone
        image_policies.read({"use": "native", "rule": rule, "max_tokens": 1}, origin="image")
