"""`tiles` and `native` plan what transformers' processors do, and `cut` gives the same bytes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional

from mmlm.errors import ConfigError
from mmlm.features import Grid, Size
from mmlm.images import NativeConfig, TilesConfig, cut_each, normalise

SIZES = [(37, 53), (224, 224), (500, 31), (13, 700), (301, 200), (1, 50), (50, 1), (480, 640)]
PINPOINTS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
ANY = st.tuples(st.integers(1, 9000), st.integers(1, 9000))


def noise(height: int, width: int) -> Image.Image:
    values = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3))
    return Image.fromarray(values.astype(np.uint8))


def ours(policy, image: Image.Image, side: int, theirs, step: int = 1) -> torch.Tensor:
    plan = policy.plan(Size(image.height, image.width), Size(side, side), step)
    resample = {1: "lanczos", 2: "bilinear", 3: "bicubic"}[int(theirs.resample)]
    tiles = cut_each(image, plan.tiles, resample=resample, fill=(0, 0, 0))
    return normalise(torch.stack(tiles), theirs.image_mean, theirs.image_std)


class TestLlavaOneVision:
    """`shrink_above` is the `anyres_max_N` of LLaVA-OneVision."""

    @settings(max_examples=200, deadline=None)
    @given(size=ANY, rows=st.sampled_from([3, 4, 27]), most=st.integers(1, 5))
    def test_its_map_is_interpolated_as_the_stock_model_does(self, size, rows, most):
        from transformers.models.llava_onevision.modeling_llava_onevision import unpad_image

        policy = TilesConfig(rule="anyres", grids=PINPOINTS, shrink_above=most)
        side, size, grid = 32, Size(*size), Grid(1, rows, rows)
        plan = policy.plan(size, Size(side, side))
        order = policy.arrange(size, plan, [grid] * len(plan.tiles))
        count = rows * rows
        table = torch.rand(count * len(plan.tiles) + 1, 2, dtype=torch.float64)
        tiles = table[count:-1].view(plan.rows, plan.columns, rows, rows, 2)
        shown = tiles.permute(4, 0, 2, 1, 3).reshape(2, plan.rows * rows, plan.columns * rows)
        shown = unpad_image(shown, list(size))
        if shown.numel() == 0:  # thinner than a feature: the stock model keeps nothing of it
            return
        ratio = math.sqrt(shown[0].numel() / (most * count))
        if ratio <= 1.1:
            assert isinstance(order, np.ndarray)
            return
        smaller = [int(length // ratio) for length in shown.shape[1:]]
        shown = functional.interpolate(shown[None], smaller, mode="bilinear")[0]
        lines = torch.cat([shown, table[-1][:, None, None].expand(2, smaller[0], 1)], dim=2)
        wanted = torch.cat([table[:count], lines.flatten(1).T])
        weights = torch.from_numpy(order.weights)[..., None]
        got = (table[torch.from_numpy(order.places)] * weights).sum(1)  # -1 is the last row
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)

    def test_it_is_for_maps_without_padding(self):
        with pytest.raises(ConfigError, match="shrink_above is for the layout unpad"):
            TilesConfig.from_dict({"rule": "ratio", "shrink_above": 9})


class TestLlavaNext:
    """The rule `anyres` with `unpad` is LLaVA-NeXT's."""

    def test_its_pixels_are_those_of_the_stock_processor(self):
        pytest.importorskip("torchvision")
        from transformers import LlavaNextImageProcessor

        theirs = LlavaNextImageProcessor(
            size={"shortest_edge": 32},
            crop_size={"height": 32, "width": 32},
            image_grid_pinpoints=[[rows * 32, columns * 32] for rows, columns in PINPOINTS],
        )
        for height, width in SIZES:
            image = noise(height, width)
            wanted = theirs(image, return_tensors="pt")["pixel_values"][0]
            got = ours(TilesConfig(rule="anyres", grids=PINPOINTS), image, 32, theirs)
            # The thumbnail of the stock processor is squeezed, then cropped to the same size.
            torch.testing.assert_close(got, wanted, rtol=0, atol=0)

    @settings(max_examples=400, deadline=None)
    @given(size=ANY, rows=st.sampled_from([3, 4, 24]))
    def test_its_tokens_are_those_of_the_stock_model(self, size, rows):
        from transformers.models.llava_next.modeling_llava_next import (
            get_anyres_image_grid_shape,
            unpad_image,
        )

        policy, side, size = TilesConfig(rule="anyres", grids=PINPOINTS), 32, Size(*size)
        plan = policy.plan(size, Size(side, side))
        grid = Grid(1, rows, rows)
        got = policy.arrange(size, plan, [grid] * len(plan.tiles))
        pins = [[r * side, c * side] for r, c in PINPOINTS]
        assert (plan.rows, plan.columns) == get_anyres_image_grid_shape(list(size), pins, side)
        count = rows * rows
        places = torch.arange(count, count + plan.rows * plan.columns * count)
        places = places.view(plan.rows, plan.columns, rows, rows).transpose(1, 2)
        shown = unpad_image(places.reshape(1, plan.rows * rows, -1), list(size))[0]
        if shown.numel() == 0:  # thinner than a feature: the stock model keeps nothing of it
            assert len(got) > count
            return
        lines = torch.cat([shown, torch.full((shown.shape[0], 1), -1)], dim=1).flatten()
        assert got.tolist() == [*range(count), *lines.tolist()]


class TestInternVL:
    """The rule `ratio` is InternVL's."""

    def test_its_pixels_are_those_of_the_stock_processor(self):
        pytest.importorskip("torchvision")
        from transformers import GotOcr2ImageProcessor

        theirs = GotOcr2ImageProcessor(
            size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=6
        )
        for height, width in SIZES:
            image = noise(height, width)
            wanted = theirs(image, return_tensors="pt")["pixel_values"]
            got = ours(TilesConfig(rule="ratio", max_tiles=6), image, 32, theirs)
            torch.testing.assert_close(got, wanted, rtol=0, atol=0)

    @settings(max_examples=500, deadline=None)
    @given(size=ANY, least=st.integers(1, 4), more=st.integers(0, 12))
    def test_its_tiles_are_those_of_the_stock_processor(self, size, least, more):
        pytest.importorskip("torchvision")
        from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

        policy = TilesConfig(rule="ratio", min_tiles=least, max_tiles=least + more)
        plan = policy.plan(Size(*size), Size(448, 448))
        columns, rows = get_optimal_tiled_canvas(size, (448, 448), least, least + more)
        assert (plan.rows, plan.columns) == (rows, columns)
        assert plan.thumbnail == (rows * columns > 1)


class TestEagle2:
    """The rule `area` weighs proportions with the area that is covered."""

    @settings(max_examples=200, deadline=None)
    @given(size=ANY)
    def test_no_grid_scores_higher(self, size):
        height, width = size
        plan = TilesConfig(rule="area").plan(Size(*size), Size(448, 448))

        def score(rows: int, columns: int) -> float:
            shape = (columns / rows) / (width / height)
            covered = rows * columns * 448 * 448 / (width * height)
            return min(covered, 0.6) * min(shape, 1 / shape)

        best = max(score(r, c) for r in range(1, 13) for c in range(1, 13) if r * c <= 12)
        assert score(plan.rows, plan.columns) == pytest.approx(best)

    def test_a_large_picture_gets_more_tiles(self):
        for size, tiles in ((300, 1), (1792, 9)):
            plan = TilesConfig(rule="area").plan(Size(size, size), Size(448, 448))
            assert plan.rows * plan.columns == tiles

    def test_turning_the_picture_turns_the_grid(self):
        side = Size(448, 448)
        for rule in ("area", "ratio", "longest"):
            plan = TilesConfig(rule=rule).plan(Size(500, 1500), side)
            turned = TilesConfig(rule=rule).plan(Size(1500, 500), side)
            assert (plan.rows, plan.columns) == (turned.columns, turned.rows)


class TestIdefics3:
    """The rule `longest` with `marks` is Idefics3's."""

    def stock(self, longest: int):
        pytest.importorskip("torchvision")
        from transformers import Idefics3ImageProcessor

        return Idefics3ImageProcessor(
            size={"longest_edge": longest * 32}, max_image_size={"longest_edge": 32}
        )

    def test_its_tiles_are_those_of_the_stock_processor(self):
        theirs = self.stock(4)
        for height, width in [*SIZES, (33, 31), (97, 200), (2, 999)]:
            image = noise(height, width)
            out = theirs([[image]], return_tensors="pt", return_row_col_info=True)
            plan = TilesConfig(rule="longest", longest_tiles=4).plan(
                Size(height, width), Size(32, 32)
            )
            rows, columns = out["rows"][0][0], out["cols"][0][0]
            assert (plan.rows, plan.columns) == (max(1, rows), max(1, columns))
            assert len(plan.tiles) == out["pixel_values"].shape[1]

    def test_its_pixels_are_near_those_of_the_stock_processor(self):
        # The stock processor resizes twice, to the longest edge and then to whole tiles, and makes
        # the thumbnail from that; here each tile comes from the picture. A smooth picture is the
        # same to a few of 255 steps.
        theirs = self.stock(2)
        down, across = np.mgrid[0:64, 0:64]
        image = Image.fromarray(np.stack([down * 3, across * 3, down + across], -1).astype("uint8"))
        wanted = theirs([[image]], return_tensors="pt")["pixel_values"][0]
        got = ours(TilesConfig(rule="longest", longest_tiles=2), image, 32, theirs)
        torch.testing.assert_close(got, wanted, rtol=0, atol=4 / 127.5)

    def test_marks_say_row_and_column_as_its_prompt_does(self):
        policy = TilesConfig(rule="longest", longest_tiles=2)
        size = Size(64, 128)
        plan = policy.plan(size, Size(64, 64))
        order = policy.arrange(size, plan, [Grid(1, 1, 1)] * 3).tolist()
        # fake, row 1 column 1, tile, fake, row 1 column 2, tile, newline, fake, global, tile, fake
        assert order == [-2, -4, 0, -2, -5, 1, -1, -2, -3, 2, -2]
        assert policy.num_marks == 3 + 3 * 3


class TestNative:
    """`smart` is Qwen2-VL's rule, `fit` is NaFlex's."""

    @settings(max_examples=500, deadline=None)
    @given(size=ANY, step=st.sampled_from([14, 16, 28, 32]))
    def test_smart_is_qwens_rule_where_qwen_has_one(self, size, step):
        pytest.importorskip("torchvision")
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        policy = NativeConfig(rule="smart", min_tokens=4, max_tokens=1280)
        got = policy.plan(Size(*size), Size(224, 224), step).tiles[0].size
        cells = got.height // step * (got.width // step)
        assert cells <= 1280
        try:
            wanted = smart_resize(*size, step, 4 * step * step, 1280 * step * step)
        except ValueError:
            return  # longer than 200 times its height, which Qwen refuses
        if min(wanted) >= step and wanted[0] * wanted[1] <= 1280 * step * step:
            assert got == wanted

    @settings(max_examples=300, deadline=None)
    @given(size=ANY, most=st.sampled_from([49, 256, 1024]))
    def test_fit_is_the_rule_of_naflex(self, size, most):
        pytest.importorskip("torchvision")
        from transformers.models.siglip2.image_processing_siglip2 import (
            get_image_size_for_max_num_patches,
        )

        got = NativeConfig(rule="fit", max_tokens=most).plan(Size(*size), Size(256, 256), 16)
        wanted = get_image_size_for_max_num_patches(*size, patch_size=16, max_num_patches=most)
        if wanted[0] // 16 * (wanted[1] // 16) <= most:
            assert got.tiles[0].size == wanted

    def test_the_pixels_of_fit_are_those_of_the_stock_processor(self):
        pytest.importorskip("torchvision")
        from transformers import Siglip2ImageProcessor

        theirs = Siglip2ImageProcessor(patch_size=8, max_num_patches=30)
        for height, width in SIZES:
            image = noise(height, width)
            out = theirs(image, return_tensors="pt")
            got = ours(NativeConfig(rule="fit", max_tokens=30), image, 16, theirs, step=8)[0]
            rows, columns = out["spatial_shapes"][0].tolist()
            assert got.shape == (3, rows * 8, columns * 8)
            patches = got.view(3, rows, 8, columns, 8).permute(1, 3, 2, 4, 0).reshape(-1, 192)
            wanted = out["pixel_values"][0][: rows * columns]
            torch.testing.assert_close(patches, wanted, rtol=0, atol=0)

    def test_long_side_never_enlarges(self):
        policy = NativeConfig(rule="long_side", long_side_px=1024, max_tokens=4096)
        sizes = {
            (100, 50): (128, 64), (2048, 512): (1024, 256), (1, 9000): (32, 1024),
            (1000, 1001): (1024, 1024),
        }  # fmt: skip
        for size, wanted in sizes.items():
            assert policy.plan(Size(*size), Size(224, 224), 32).tiles[0].size == wanted

    @settings(max_examples=300, deadline=None)
    @given(size=ANY, longest=st.integers(1, 1600), step=st.sampled_from([8, 14, 28, 32]))
    def test_long_side_is_pixtrals(self, size, longest, step):
        from transformers.models.pixtral.image_processing_pixtral import (
            get_resize_output_image_size,
        )

        policy = NativeConfig(rule="long_side", long_side_px=longest, max_tokens=10**6)
        tile = policy.plan(Size(*size), Size(224, 224), step).tiles[0]
        pixels = np.broadcast_to(np.uint8(0), (*size, 3))
        wanted = get_resize_output_image_size(pixels, longest, step, "channels_last")
        # A strip thinner than one pixel has no tokens there.
        assert tile.size == tuple(max(step, length) for length in wanted)

    def test_framed_rows_are_solos(self):
        policy, size = NativeConfig(layout="framed"), Size(32, 48)
        plan = policy.plan(size, Size(32, 32), 16)
        order = policy.arrange(size, plan, [Grid(1, 2, 3)])
        assert order.tolist() == [-2, 0, 1, 2, -1, 3, 4, 5, -1, -3]


def test_a_map_cannot_be_made_of_tokens_without_places():
    policy, size = TilesConfig(rule="anyres"), Size(100, 100)
    plan = policy.plan(size, Size(32, 32))
    with pytest.raises(ConfigError, match="layout: plain"):
        policy.arrange(size, plan, [Grid(1, 1, 16)] * len(plan.tiles))


def test_unpad_without_padding_is_refused():
    with pytest.raises(ConfigError, match="use newline"):
        TilesConfig.from_dict({"rule": "ratio", "layout": "unpad"})
