"""Towers that take whole clips give what stock transformers gives, and are counted exactly."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, VideoMAEConfig, VivitConfig, XCLIPVisionConfig
from transformers.models.x_clip.modeling_x_clip import XCLIPVisionModel

from mmlm import load
from mmlm.errors import ConfigError
from mmlm.features import ClipSize, Grid
from mmlm.messages import Clip
from mmlm.vision import encoders
from tests import tiny

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 32,
}  # fmt: skip
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}
KINDS = {
    "videomae": (VideoMAEConfig(**SMALL, patch_size=8, num_frames=4), Grid(2, 4, 4)),
    "vivit": (VivitConfig(**SMALL, tubelet_size=[2, 8, 8], num_frames=4), Grid(2, 4, 4)),
    "xclip": (
        XCLIPVisionConfig(**SMALL, patch_size=8, num_frames=3, mit_hidden_size=32), Grid(3, 4, 4),
    ),
}  # fmt: skip


@pytest.fixture(params=KINDS)
def kind(request, tmp_path):
    """The words of one, its grid, and the stock tower."""
    config, grid = KINDS[request.param]
    torch.manual_seed(0)
    is_xclip = request.param == "xclip"
    theirs = XCLIPVisionModel(config) if is_xclip else AutoModel.from_config(config)
    theirs.eval().save_pretrained(tmp_path / "tower")
    return {"use": "hf_clips", "checkpoint": str(tmp_path / "tower"), **HALF}, grid, theirs


def clip(count: int = 7) -> Clip:
    return Clip(tuple(tiny.picture(number, 24, 40) for number in range(count)))


def test_features_are_those_of_the_stock_tower_without_its_prefix(kind):
    words, grid, theirs = kind
    encoder = encoders.read(words, origin="vision").load()
    frames = encoder.facts.frames
    given = torch.randn(2, frames, 3, 32, 32)
    with torch.no_grad():
        got = encoder(given.flatten(1, 2))
        if frames == 3:
            states = theirs(given.flatten(0, 1)).last_hidden_state
            wanted = states[:, 1:].reshape(-1, 32)
        else:
            states = theirs(given).last_hidden_state
            wanted = states[:, -grid.num_tokens :].reshape(-1, 32)
    assert got.grids == (grid,) * 2
    torch.testing.assert_close(got.values, wanted, rtol=0, atol=0)


def test_clips_of_any_length_and_pictures_are_counted_learn_and_come_back(kind, tmp_path):
    words, grid, _ = kind
    made = tiny.compose_tiny(tmp_path, eye=words, video={"use": "frames"})
    looks = made.processor.image_processor
    frames = made.model.config.facts.frames
    for shown in (clip(7), clip(1), tiny.picture(3)):
        assert made.processor.count_tokens(shown) == grid.num_tokens
    assert made.processor.size_of(clip(7)) == ClipSize(24, 40, frames)
    # A picture is a clip that stands still.
    with torch.no_grad():
        still = Clip((tiny.picture(3),) * frames)
        seen = [
            made.model.get_image_features(**looks.together([looks.look(each)])).values
            for each in (tiny.picture(3), still)
        ]
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=0)
    words_out = made.answer("What?", images=[clip(7), tiny.picture(1)], max_new_tokens=4)
    given = looks.together([looks.look(clip(7))])
    features = made.model.get_image_features(**given)
    features.values.square().sum().backward()
    tower = dict(made.model.model.vision.named_parameters())
    idle = made.model.model.vision.idle_parameters()
    assert {name for name, weight in tower.items() if weight.grad is None} == idle
    made.save(tmp_path / "saved")
    back = load(tmp_path / "saved", device="cpu")
    assert back.answer("What?", images=[clip(7), tiny.picture(1)], max_new_tokens=4) == words_out


def test_pooling_follows_and_what_compares_frames_is_refused(tmp_path):
    tower = KINDS["videomae"][0].to_dict()
    words = {"use": "hf_clips", "config": tower, **HALF}
    made = tiny.compose_tiny(tmp_path, eye=words, video={"use": "frames", "pool": [1, 2, 2]})
    assert made.processor.count_tokens(clip()) == 4
    made.answer("What?", images=[clip()], max_new_tokens=2)
    with pytest.raises(ConfigError, match="whole clips"):
        made.with_video(drop=1.0)


def test_towers_of_clips_and_of_pictures_are_told_apart():
    tower = KINDS["videomae"][0].to_dict()
    with pytest.raises(ConfigError, match="hf_clips"):
        encoders.read({"use": "hf", "config": tower, **HALF}, origin="vision").load()
    picture = {"model_type": "clip_vision_model", **SMALL, "patch_size": 8}
    with pytest.raises(ConfigError, match="use: hf"):
        encoders.read({"use": "hf_clips", "config": picture, **HALF}, origin="vision").load()
    with pytest.raises(ConfigError, match="no layers"):
        encoders.read({"use": "hf_clips", "config": tower, "side_px": 64}, origin="vision")
