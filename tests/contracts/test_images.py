"""What every image policy promises. A new one is tested as soon as it is registered."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmlm.features import Size
from mmlm.images import cut_all, image_policies

EDGES = [(1, 1), (1, 997), (997, 1), (3, 2), (224, 224), (479, 641), (2, 20_000), (20_000, 2)]


@pytest.mark.parametrize("name", list(image_policies))
class TestEveryImagePolicy:
    def test_its_config_survives_json(self, name):
        policy = image_policies.read({"use": name}, origin="image")
        assert image_policies.read(policy.to_dict(), origin="image") == policy

    @settings(max_examples=100, deadline=None)
    @given(height=st.integers(1, 65_535), width=st.integers(1, 65_535), side=st.integers(14, 1024))
    def test_a_plan_is_a_pure_function_of_sizes(self, name, height, width, side):
        policy = image_policies.read({"use": name}, origin="image")
        plan = policy.plan(Size(height, width), Size(side, side))
        assert plan == policy.plan(Size(height, width), Size(side, side))
        assert plan.rows >= 1
        assert plan.columns >= 1
        assert len(plan.tiles) == plan.rows * plan.columns + plan.thumbnail
        for tile in plan.tiles:
            left, top, right, bottom = tile.box
            assert left < right
            assert top < bottom
            assert min(tile.size) >= 1

    @pytest.mark.parametrize("size", EDGES, ids=str)
    def test_the_tiles_that_come_out_are_the_tiles_that_were_planned(self, name, size):
        policy = image_policies.read({"use": name}, origin="image")
        plan = policy.plan(Size(*size), Size(28, 28))
        tiles = cut_all(Image.new("RGB", (size[1], size[0])), plan.tiles)
        assert tiles.shape == (len(plan.tiles), 3, *plan.tiles[0].size)
