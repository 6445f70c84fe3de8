"""The encoder of Qwen2.5-VL alone: cut as its own processor cuts, ragged, from a joint folder."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    PretrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
)

from mmlm.errors import ConfigError
from mmlm.features import Size
from mmlm.images import NativeConfig, cut_each, normalise
from mmlm.vision import encoders, hf_facts
from tests.contracts.test_stock_classes import QWEN_VIT
from tests.tiny import TEXT, picture


def eye(**words):
    words = {"use": "hf", "config": QWEN_VIT, "layer": "last", **words}
    torch.manual_seed(0)
    return encoders.read(words, origin="vision").load()


def test_the_tower_is_found_beside_its_config_where_it_is_not_exported():
    config = encoders.read({"use": "hf", "config": QWEN_VIT, "layer": "last"}, origin="vision")
    tower = type(config.load().tower)
    assert hf_facts._only_class_of(tower.config_class) is tower
    assert hf_facts._only_class_of(Qwen2_5_VLConfig) is None  # several models are built from it
    assert hf_facts._only_class_of(PretrainedConfig) is None


def test_patches_are_those_of_qwens_processor_and_tiles_do_not_see_one_another():
    encoder = eye()
    theirs = Qwen2VLImageProcessor(patch_size=8, merge_size=2, size={
        "shortest_edge": 4 * 256, "longest_edge": 12 * 256,
    })  # fmt: skip
    pictures = [picture(1, 40, 56), picture(2, 90, 33), picture(3, 20, 20)]
    seen = theirs(pictures, return_tensors="pt")
    wanted = encoder.tower(seen["pixel_values"], grid_thw=seen["image_grid_thw"]).pooler_output
    policy, facts = NativeConfig(min_tokens=4, max_tokens=12), encoder.facts
    tiles = []
    for each in pictures:
        plan = policy.plan(Size(each.height, each.width), facts.side_size, facts.step)
        cut = cut_each(each, plan.tiles, resample=facts.resample, fill=(0, 0, 0))
        tiles.append(normalise(torch.stack(cut), facts.mean, facts.std)[0])
    together = encoder.encode_tiles(tiles)
    assert [(g.rows, g.columns) for g in together.grids] == [
        (rows // 2, columns // 2) for _, rows, columns in seen["image_grid_thw"].tolist()
    ]
    # The same numbers in the same order; only the sums over ragged pictures are split.
    torch.testing.assert_close(together.values, wanted, rtol=0, atol=1e-5)
    alone = torch.cat([encoder.encode_tiles([tile]).values for tile in tiles])
    torch.testing.assert_close(together.values, alone, rtol=0, atol=1e-5)
    together.values.sum().backward()
    assert all(weight.grad is not None for weight in encoder.parameters())


def test_it_is_taken_out_of_a_joint_folder(tmp_path):
    text = {**TEXT, "vocab_size": 300, "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2],
    }}  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text, vision_config=QWEN_VIT)
    joint = Qwen2_5_VLForConditionalGeneration(config)
    joint.save_pretrained(tmp_path)
    encoder = eye(checkpoint=str(tmp_path), config=None)
    for name, value in joint.model.visual.state_dict().items():
        assert torch.equal(encoder.tower.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("words", "said"),
    [({"layer": -2}, "Write `layer: last`"), ({"side_px": 40}, "not a multiple of 16.*take 32")],
    ids=["layer", "side"],
)
def test_what_it_does_not_take_is_said(words, said):
    with pytest.raises(ConfigError, match=said):
        eye(**words)
