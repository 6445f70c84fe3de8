"""Packed features agree with their definition, and refuse grids that do not fit."""

from __future__ import annotations

import pytest
import torch

from mmlm.errors import AlignmentError
from mmlm.features import Grid, VisionFeatures, by_grid

GRIDS = (Grid(1, 2, 2), Grid(1, 1, 3), Grid(1, 2, 2), Grid(2, 1, 1))


@pytest.fixture
def features() -> VisionFeatures:
    return VisionFeatures(torch.arange(13 * 5, dtype=torch.float32).reshape(13, 5), GRIDS)


def test_offsets_say_where_each_item_begins_and_where_all_end(features):
    assert features.offsets == (0, 4, 7, 11, 13)
    assert features.width == 5


def test_items_are_slices_at_the_offsets(features):
    for index, item in enumerate(features.items()):
        start, end = features.offsets[index], features.offsets[index + 1]
        assert torch.equal(item, features.values[start:end])


def test_padding_adds_nothing_that_the_mask_does_not_hide(features):
    padded, mask = features.pad()
    assert padded.shape == (4, 4, 5)
    assert torch.equal(padded[mask], features.values)
    assert mask.sum(1).tolist() == [4, 3, 4, 2]


def test_items_of_the_same_grid_are_found_together(features):
    assert by_grid(features) == [(GRIDS[0], [0, 2]), (GRIDS[1], [1]), (GRIDS[3], [3])]


def test_values_that_do_not_fit_their_grids_are_refused():
    with pytest.raises(AlignmentError, match=r"2 items with 6 tokens .* came with 5"):
        VisionFeatures(torch.zeros(5, 3), (Grid(1, 2, 2), Grid(1, 1, 2)))


def test_a_part_may_change_values_and_grids_together_only(features):
    halved = features.with_values(torch.zeros(2, 7), [Grid(1, 1, 1), Grid(1, 1, 1)])
    assert halved.width == 7
    with pytest.raises(AlignmentError):
        features.with_values(torch.zeros(2, 7))


def test_features_of_nothing_are_empty():
    empty = VisionFeatures(torch.zeros(0, 3), ())
    assert empty.offsets == (0,)
    assert by_grid(empty) == []
