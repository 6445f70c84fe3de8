"""What every vision encoder promises. A new one is tested as soon as it is registered here.

An encoder needs words that make a tiny untrained one; `TINY` holds them, and a test fails for a
registered encoder that has none.
"""

from __future__ import annotations

import copy
import json
from functools import cache

import pytest
import torch

from mmlm.errors import ConfigError
from mmlm.features import Size
from mmlm.vision import VisionFacts, encoders

TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
HF = {
    kind: {"use": "hf", "config": {"model_type": model_type, **TOWER, **more}}
    for kind, model_type, more in (
        ("clip", "clip_vision_model", {}),
        ("siglip", "siglip_vision_model", {}),
        ("siglip2", "siglip2_vision_model", {"num_patches": 16}),
        ("dinov2", "dinov2", {"mlp_ratio": 2}),
        ("dinov2_with_registers", "dinov2_with_registers", {"mlp_ratio": 2}),
    )
}
HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
TIMM = {"use": "timm", "pretrained": False, "side_px": 64}
FLORENCE = {
    "use": "florence2",
    "side_px": 64,
    "prompt_ids": [[0, 7, 2], [0, 8, 9, 2]],
    "config": {
        "model_type": "florence2",
        "vision_config": {
            "depths": [1, 1, 1, 1],
            "embed_dim": [8, 8, 16, 16],
            "num_heads": [2, 2, 2, 2],
            "num_groups": [2, 2, 2, 2],
            "window_size": 4,
            "projection_dim": 24,
        },
        "text_config": {
            "model_type": "bart",
            "vocab_size": 40,
            "d_model": 24,
            "encoder_layers": 2,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "max_position_embeddings": 64,
        },
        "image_token_id": 39,
    },
}
TINY = {
    "florence2": [FLORENCE, FLORENCE | {"depths": ["entry", 2, -1]}],
    "hf": [
        *HF.values(),
        HF["clip"] | {"layer": "last"},
        HF["siglip"] | {"layer": "last", "side_px": 48},
        HF["clip"] | {"prefix": "keep_as_tokens"},
        HF["siglip"] | {"layers": [0, 1, -1]},
        HF["dinov2_with_registers"] | {"prefix": "drop_first"},
        HF["siglip2"],
        HF["siglip2"] | {"layer": "last", "layers": [0, -1], "side_px": 48},
    ],
    "timm": [
        TIMM | {"checkpoint": "test_vit"},
        TIMM | {"checkpoint": "test_convnext"},
        TIMM | {"checkpoint": "test_efficientnet", "feature": "final"},
        TIMM | {"checkpoint": "test_vit", "layer": -2, "prefix": "keep_as_tokens"},
        TIMM | {"checkpoint": "test_vit", "layers": [0, 1, -1], "prefix": "keep_as_tokens"},
        TIMM | {"checkpoint": "test_convnext", "layers": [-3, -1]},
    ],
    "patches": [{"use": "patches", "patch_px": 8, "side_px": 32}],
    "embedding": [
        {"use": "embedding", "config": HF["clip"]["config"] | {"projection_dim": 24}},
        {"use": "embedding", "config": HF["siglip"]["config"], "into_width": 20, "depth": 2},
    ],
    # Its own package is heavy: tests/vision/test_open_clip.py runs where it is installed.
    "open_clip": [],
    "mixture": [
        {"use": "mixture", "encoders": [HF["dinov2"], HF["siglip"] | {"side_px": 48}]},
        {
            "use": "mixture",
            "fuse": "sequence",
            "encoders": [
                HF["clip"] | {"prefix": "keep_as_tokens"},
                TIMM | {"checkpoint": "test_convnext"},
                {"use": "patches", "patch_px": 8, "side_px": 32}
                | {"reducer": {"use": "pixel_shuffle"}},
            ],
        },
        {
            "use": "mixture",
            "fuse": "levels",
            "grid": 3,
            "encoders": [HF["clip"] | {"layers": [0, 1, 2]}, HF["siglip"] | {"layers": [1, -1]}],
        },
        {
            "use": "mixture",
            "fuse": "experts",
            "encoders": [
                HF["clip"],
                HF["dinov2"] | {"about": "It sees shapes."},
                TIMM | {"checkpoint": "test_convnext", "about": "It sees colours."},
            ],
        },
    ],
    "scales": [
        {"use": "scales", "encoder": HF["siglip"], "factors": [1, 2]},
        {"use": "scales", "encoder": HF["clip"], "factors": [1, 3], "dynamic": True},
    ],
    "hf_clips": [
        {"use": "hf_clips", **HALF, "config": {"model_type": "videomae", "num_frames": 4, **TOWER}},
        {
            "use": "hf_clips",
            **HALF,
            "config": {
                "model_type": "vivit",
                "num_frames": 4,
                "tubelet_size": [2, 8, 8],
                **{key: value for key, value in TOWER.items() if key != "patch_size"},
            },
        },
        {
            "use": "hf_clips",
            **HALF,
            "config": {
                "model_type": "xclip_vision_model",
                "num_frames": 3,
                "mit_hidden_size": 32,
                **TOWER,
            },
        },
    ],
    "extended": [
        {"use": "extended", "encoder": HF["clip"], "registers": 2},
        {"use": "extended", "encoder": TIMM | {"checkpoint": "test_vit"}, "registers": 3},
        {"use": "extended", "encoder": HF["dinov2"] | {"layer": "last"}, "channel_tokens": 5},
        {"use": "extended", "encoder": HF["siglip"] | {"layers": [1, -1]}, "positions": "lookhere"},
        {
            "use": "extended",
            "encoder": HF["dinov2_with_registers"],
            "registers": 1,
            "channel_tokens": 2,
            "positions": "lookhere",
        },
    ],
}
CASES = [words for group in TINY.values() for words in group]


def name_of(words: dict) -> str:
    config = words.get("config", {})
    kind = words.get("checkpoint") or config.get("model_type") or words["use"]
    keys = (
        "layer", "layers", "feature", "prefix", "fuse", "factors", "dynamic", "registers",
        "channel_tokens", "positions", "depths", "into_width",
    )  # fmt: skip
    more = [str(words[key]) for key in keys if key in words]
    return "-".join([kind, *more])


@cache
def loaded(words: str):
    torch.manual_seed(0)
    return encoders.read(json.loads(words), origin="vision").load()


def test_every_registered_encoder_is_tested():
    assert set(encoders) == set(TINY)


@pytest.mark.parametrize("words", CASES, ids=name_of)
class TestEveryEncoder:
    @pytest.fixture
    def encoder(self, words):
        return copy.deepcopy(loaded(json.dumps(words)))

    @pytest.fixture
    def pixels(self, encoder):
        facts = encoder.facts
        generator = torch.Generator().manual_seed(1)
        shape = (facts.frames * facts.channels, *facts.side)
        if facts.parts:  # each encoder gets pixels of its own, in one row of numbers
            shape = (facts.num_numbers(facts.side_size),)
        return torch.randn(3, *shape, generator=generator)

    def test_its_config_and_its_facts_survive_json(self, words, encoder):
        config = encoders.read(words, origin="vision")
        assert encoders.read(json.loads(json.dumps(config.to_dict())), origin="vision") == config
        facts = json.loads(json.dumps(encoder.facts.to_dict()))
        assert VisionFacts.from_dict(facts) == encoder.facts

    def test_what_comes_out_is_what_its_facts_say(self, encoder, pixels):
        facts = encoder.facts
        out = encoder(pixels)
        grid = facts.out_grid(Size(*facts.side))
        assert out.grids == (grid,) * 3
        assert out.values.shape == (3 * grid.num_tokens, facts.width)
        prefix = None if out.prefix is None else out.prefix.shape
        assert prefix == ((3, facts.num_prefix, facts.width) if facts.num_prefix else None)

    def test_a_tile_alone_is_the_same_as_beside_others(self, encoder, pixels):
        with torch.no_grad():
            together = encoder(pixels).items()
            for tile, item in zip(pixels, together, strict=True):
                # Matrix products may add in another order for another batch; tiles that see one
                # another (batch norm in training mode) differ by more than 0.01.
                alone = encoder(tile[None]).values
                torch.testing.assert_close(alone, item, rtol=1e-4, atol=1e-5)

    def test_a_tile_is_the_same_in_training_mode(self, encoder, pixels):
        with torch.no_grad():
            calm = encoder.eval()(pixels).values
            torch.testing.assert_close(encoder.train()(pixels).values, calm, rtol=0, atol=0)

    def test_every_parameter_that_is_not_idle_gets_a_gradient(self, encoder, pixels):
        pixels.requires_grad_()
        out = encoder.train()(pixels)
        sum(each.values.square().sum() for each in (out, *out.layers)).backward()
        assert pixels.grad is not None
        assert pixels.grad.any(dim=1).all()
        still = {n for n, p in encoder.named_parameters() if p.grad is None}
        assert still == encoder.idle_parameters()

    def test_a_frozen_encoder_makes_no_graph(self, encoder, pixels):
        encoder.requires_grad_(False).train()
        assert not encoder(pixels).values.requires_grad
        assert not any(module.training for module in encoder.modules() if module is not encoder)

    def test_it_works_in_bf16(self, encoder, pixels):
        out = encoder.to(torch.bfloat16)(pixels.to(torch.bfloat16))
        assert out.values.dtype == torch.bfloat16
        assert out.values.isfinite().all()

    def test_it_is_built_again_from_what_config_json_holds(self, words, encoder, pixels):
        facts = VisionFacts.from_dict(json.loads(json.dumps(encoder.facts.to_dict())))
        tower = json.loads(json.dumps(encoder.tower_config))
        again = encoders.read(words, origin="vision").build(facts, tower)
        again.load_state_dict(encoder.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(
                again.eval()(pixels).values, encoder.eval()(pixels).values, rtol=0, atol=0
            )

    def test_a_tile_of_a_wrong_size_is_refused_with_sizes_that_work(self, encoder):
        height, width = encoder.facts.side
        with pytest.raises(ConfigError, match=f"It takes {height} x {width}"):
            encoder.facts.out_grid(Size(height + 1, width))
        channels = encoder.facts.frames * encoder.facts.channels
        with pytest.raises(ConfigError, match=f"It takes {height} x {width}"):
            encoder(torch.zeros(1, channels, height + 1, width))

    def test_other_sizes_that_its_facts_promise_are_taken(self, encoder):
        facts = encoder.facts
        if facts.rule == "fixed":
            pytest.skip("takes one size alone")
        for rows, columns in ((5, 3), (2, 7)):
            size = Size(rows * facts.step, columns * facts.step)
            grid = facts.out_grid(size)
            out = encoder(torch.zeros(1, facts.channels, *size))
            assert out.values.shape[0] == grid.num_tokens
