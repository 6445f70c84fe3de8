"""Several encoders at once, and one at several scales, against each encoder alone."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from mmlm import load
from mmlm.connectors import LevelMergeConnectorConfig
from mmlm.errors import AlignmentError, ConfigError
from mmlm.features import Grid, VisionFeatures
from mmlm.messages import user
from mmlm.vision import encoders
from tests import tiny

TOWER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
CLIP = {"use": "hf", "config": {"model_type": "clip_vision_model", **TOWER}}
SIGLIP = {"use": "hf", "config": {"model_type": "siglip_vision_model", **TOWER}}
NARROW = {"use": "hf", "config": {"model_type": "siglip_vision_model", **TOWER, "hidden_size": 16}}


def loaded(words: dict):
    torch.manual_seed(0)
    return encoders.read(words, origin="vision").load().eval().requires_grad_(False)


def pair(fuse: str, **more):
    return loaded({"use": "mixture", "fuse": fuse, "encoders": [CLIP, NARROW | more]})


def numbers_of(mixture, seed: int = 0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the row of numbers of two tiles, and what each encoder gets of them."""
    draw = torch.Generator().manual_seed(seed)
    own = [torch.randn(2, 3, *part.side, generator=draw) for part in mixture.facts.parts]
    rows = [each.flatten() for tile in zip(*own, strict=True) for each in tile]
    return torch.cat(rows).view(2, -1), own


def test_channels_are_those_of_each_encoder_alone():
    mixture = pair("channels")
    rows, (first, second) = numbers_of(mixture)
    out = mixture(rows)
    assert out.grids == (Grid(1, 4, 4),) * 2
    torch.testing.assert_close(out.values[:, :32], mixture.encoders[0](first).values)
    torch.testing.assert_close(out.values[:, 32:], mixture.encoders[1](second).values)


def test_another_grid_is_resized_corner_on_corner():
    mixture = pair("channels", side_px=56)
    rows, (_, second) = numbers_of(mixture)
    alone = mixture.encoders[1](second).values.view(2, 7, 7, 16).permute(0, 3, 1, 2)
    wanted = functional.interpolate(alone, size=(4, 4), mode="bilinear", align_corners=True)
    got = mixture(rows).values[:, 32:]
    torch.testing.assert_close(got, wanted.permute(0, 2, 3, 1).flatten(0, 2))


def test_a_sequence_has_channels_of_its_own_for_each_encoder():
    mixture = pair("sequence", side_px=48)
    rows, (first, second) = numbers_of(mixture)
    out = mixture(rows)
    assert mixture.facts.out_grid(mixture.facts.side_size).num_tokens == 16 + 36
    tiles = out.values.view(2, 52, 48)
    alone = mixture.encoders[0](first).values.view(2, 16, 32)
    torch.testing.assert_close(tiles[:, :16, :32], alone)
    assert not tiles[:, :16, 32:].any()
    assert not tiles[:, 16:, :32].any()
    torch.testing.assert_close(tiles[:, 16:, 32:].flatten(0, 1), mixture.encoders[1](second).values)


def test_each_encoder_gets_pixels_of_its_own(tmp_path):
    words = {"use": "mixture", "encoders": [CLIP, SIGLIP | {"side_px": 48, "resample": "bilinear"}]}
    made = tiny.compose_tiny(tmp_path, eye=words, image={"use": "tiles", "max_tiles": 4})
    picture = tiny.picture(3, 40, 90)
    numbers, size = made.processor.image_processor.look(picture)
    counter = made.model.model.counter
    count = len(counter.plan(size).tiles)
    assert count == 3
    rows = numbers.view(count, -1)
    for number, own in enumerate(words["encoders"]):
        alone = tiny.compose_tiny(
            tmp_path / str(number), eye=own, image={"use": "tiles", "max_tiles": 4}
        )
        looks = alone.processor.image_processor
        wanted, _ = looks.look(picture)
        flat = wanted.reshape(wanted.shape[0], -1)
        begin = 0 if number == 0 else 3 * 32 * 32
        torch.testing.assert_close(rows[:, begin : begin + flat.shape[1]], flat, rtol=0, atol=0)


def test_it_learns_answers_and_comes_back(tmp_path):
    words = {"use": "mixture", "encoders": [CLIP, NARROW]}
    made = tiny.compose_tiny(tmp_path, eye=words)
    assert isinstance(made.answer("What?", images=[tiny.picture()], max_new_tokens=3), str)
    encoded = made.processor.encode_chat(
        [user("What?", [tiny.picture()])], add_generation_prompt=True
    )
    given = {
        "input_ids": torch.tensor([encoded.ids]),
        "pixel_values": encoded.pixel_values,
        **made.processor.image_processor.sizes(encoded.image_sizes),
    }
    made.model(**given, labels=given["input_ids"]).loss.backward()
    parameters = dict(made.model.model.vision.named_parameters())
    still = {name for name, weight in parameters.items() if weight.grad is None}
    assert still == made.model.model.vision.idle_parameters()
    made.model.requires_grad_(False)
    made.save(tmp_path / "saved")
    back = load(tmp_path / "saved", device="cpu")
    torch.testing.assert_close(
        back.model(**given).logits, made.model(**given).logits, rtol=0, atol=0
    )


def test_only_the_encoder_that_learns_is_in_training_mode():
    mixture = pair("channels")
    mixture.encoders[1].requires_grad_(True)
    mixture.train()
    assert not mixture.encoders[0].tower.training
    assert mixture.encoders[1].tower.training


def test_levels_are_merged_with_weights_that_sum_to_one():
    mixture = loaded(
        {
            "use": "mixture",
            "fuse": "levels",
            "encoders": [CLIP | {"layers": [0, 1]}, SIGLIP | {"layers": [2]}],
        }
    )
    rows, (first, second) = numbers_of(mixture)
    out = mixture(rows)
    assert len(out.layers) == mixture.facts.num_layers == 3
    torch.testing.assert_close(out.layers[1].values, mixture.encoders[0](first).layers[1].values)
    torch.testing.assert_close(out.layers[2].values, mixture.encoders[1](second).layers[0].values)

    torch.manual_seed(0)
    merge = LevelMergeConnectorConfig(groups=(2, 1)).build(vision_width=32, text_width=8)
    merge.weights[0].data = torch.tensor([0.3, -0.4])
    share = torch.tensor([0.3, -0.4]).exp()
    share = share / share.sum()
    mapped = [
        linear(norm(level.values))
        for norm, linear, level in zip(merge.norms, merge.maps, out.layers, strict=True)
    ]
    own = share[0] * mapped[0] + share[1] * mapped[1]
    wanted = merge.project(torch.cat([own, merge.meet[0](mapped[2])], -1))
    torch.testing.assert_close(merge(out).values, wanted)
    with pytest.raises(AlignmentError, match="reads 3 hidden states"):
        merge(VisionFeatures(out.values, out.grids))


def test_levels_of_different_widths_are_refused():
    with pytest.raises(ConfigError, match="of one width"):
        pair("levels")


def test_one_scale_is_the_encoder_itself():
    words = {"use": "scales", "encoder": SIGLIP, "factors": [1]}
    scales = loaded(words)
    pixels = torch.randn(2, 3, 32, 32)
    wanted = scales.encoder(pixels)
    torch.testing.assert_close(scales(pixels).values, wanted.values)
    assert scales(pixels).grids == wanted.grids


def test_the_second_scale_is_the_mean_of_its_squares():
    scales = loaded({"use": "scales", "encoder": SIGLIP, "factors": [1, 2]})
    pixels = torch.randn(1, 3, 64, 64)
    out = scales(pixels)
    small = functional.interpolate(pixels, size=(32, 32), mode="bicubic", antialias=True)
    torch.testing.assert_close(out.values[:, :32], scales.encoder(small).values)
    squares = [pixels[..., y : y + 32, x : x + 32] for y in (0, 32) for x in (0, 32)]
    maps = [scales.encoder(square).values.view(4, 4, 32) for square in squares]
    whole = torch.cat([torch.cat(maps[:2], 1), torch.cat(maps[2:], 1)], 0)
    wanted = whole.view(4, 2, 4, 2, 32).mean((1, 3)).view(16, 32)
    torch.testing.assert_close(out.values[:, 32:], wanted, rtol=1e-4, atol=1e-5)
