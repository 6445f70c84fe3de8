"""Prefix maps are read both ways and lose nothing."""

from __future__ import annotations

import pytest

from mmlm.errors import CheckpointError
from mmlm.hub.keymaps import KeyMap, compare_keys

MAP = KeyMap(
    (("model.language.", "language_model.model."), ("model.vision.tower.", "tower.vision_model.")),
    optional=("vision_model.",),
)


def test_what_is_renamed_comes_back():
    ours = {"model.language.norm.weight": 1, "model.vision.tower.conv.bias": 2}
    theirs = MAP.to_theirs(ours, origin="x")
    assert theirs == {"language_model.model.norm.weight": 1, "tower.vision_model.conv.bias": 2}
    assert MAP.to_ours(theirs, origin="x") == ours


def test_an_optional_level_may_be_missing_while_reading():
    assert MAP.to_ours({"tower.conv.bias": 2}, origin="x") == {"model.vision.tower.conv.bias": 2}


def test_a_tensor_without_a_place_is_named():
    with pytest.raises(CheckpointError, match=r"folder: 1 of 2 tensors have no place.*adapter\.a"):
        MAP.to_theirs({"model.language.a": 1, "adapter.a": 2}, origin="folder")


def test_two_layouts_in_one_file_are_refused():
    with pytest.raises(CheckpointError, match="two tensors would both be called"):
        MAP.to_ours({"tower.a": 1, "tower.vision_model.a": 2}, origin="folder")


def test_missing_and_left_over_keys_are_both_named():
    with pytest.raises(CheckpointError, match="1 missing: a; 1 not known to the model: c"):
        compare_keys(["b", "c"], ["a", "b", "tied"], origin="folder", may_lack=["tied"])
