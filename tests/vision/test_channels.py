"""Pictures and encoders of any number of channels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mmlm import load
from mmlm.errors import ConfigError, ImageError
from mmlm.features import Size
from mmlm.images import read_size
from mmlm.images.base import Tile
from mmlm.images.planes import Planes, open_planes
from mmlm.images.resize import cut
from mmlm.messages import user
from mmlm.vision import encoders
from tests import tiny

TOWER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
CLIP = {"use": "hf", "config": {"model_type": "clip_vision_model", **TOWER}}
TIMM = {"use": "timm", "checkpoint": "test_convnext", "pretrained": False, "side_px": 64}


def bands(channels: int = 5, height: int = 40, width: int = 56) -> np.ndarray:
    draw = np.random.default_rng(0)
    return draw.integers(0, 65_536, (height, width, channels)).astype(np.uint16)


@pytest.mark.parametrize("words", [CLIP, TIMM, {"use": "patches", "side_px": 32}], ids=str)
def test_an_encoder_of_five_channels_sees_all_of_them(words):
    if words["use"] == "timm":
        pytest.importorskip("timm")
    encoder = encoders.read(words | {"channels": 5}, origin="vision").load()
    facts = encoder.facts
    assert facts.channels == len(facts.mean) == 5
    pixels = torch.randn(1, 5, *facts.side, requires_grad=True)
    encoder(pixels).values.square().sum().backward()
    assert pixels.grad.abs().sum((0, 2, 3)).gt(0).all()


def test_a_grey_picture_gives_what_it_gave_before(tmp_path):
    folder = str(tiny.save_vision(tmp_path / "clip"))
    words = {"use": "hf", "checkpoint": folder, "mean": [0.5] * 3, "std": [0.5] * 3}
    three = encoders.read(words, origin="vision").load()
    six = encoders.read(
        words | {"channels": 6, "mean": [0.5] * 6, "std": [0.5] * 6}, origin="vision"
    ).load()
    grey = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        before = three(grey.expand(-1, 3, -1, -1)).values
        after = six(grey.expand(-1, 6, -1, -1)).values
    # The kernel is summed in another order.
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_sixteen_bits_are_kept_and_windows_are_the_same_as_for_bytes():
    values = np.random.default_rng(0).integers(0, 256, (30, 44, 3)).astype(np.uint8)
    tile = Tile((-4, 0, 44, 30), Size(16, 16), Size(20, 24), (2, -3))
    for resample in ("bilinear", "bicubic"):
        settings = {"resample": resample, "fill": (9, 8, 7)}
        wanted = cut(Image.fromarray(values), tile, **settings).float()
        got = cut(open_planes(values, channels=3), tile, **settings)
        # Bytes are rounded after each of two passes.
        assert (got - wanted).abs().max() <= 1.5
    exact = cut(open_planes(bands(), channels=5), Tile((0, 0, 56, 40), Size(40, 56)))
    torch.testing.assert_close(
        exact, torch.from_numpy(bands().astype(np.float32) / 257.0).permute(2, 0, 1)
    )


def test_a_file_of_bands_trains_answers_and_comes_back(tmp_path):
    path = tmp_path / "bands.npy"
    np.save(path, bands())
    assert read_size(path) == read_size(str(path)) == read_size(path.read_bytes()) == (40, 56)
    words = {"use": "patches", "patch_px": 8, "side_px": 32, "channels": 5}
    made = tiny.compose_tiny(tmp_path, eye=words, image={"use": "letterbox"})
    encoded = made.processor.encode_chat([user("What?", [path])], add_generation_prompt=True)
    assert encoded.pixel_values.shape == (1, 5, 32, 32)
    ids = torch.tensor([encoded.ids])
    made.model(input_ids=ids, pixel_values=encoded.pixel_values, labels=ids).loss.backward()
    answer = made.answer("What?", images=[path], max_new_tokens=4)
    chat = made.chat(max_new_tokens=4)
    assert chat.ask("What?", images=[path]) == answer
    made.save(tmp_path / "saved")
    back = load(tmp_path / "saved", device="cpu")
    assert back.answer("What?", images=[bands()], max_new_tokens=4) == answer


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (np.zeros((4, 4, 7), np.uint8), "encoder of 5 channels"),
        (np.zeros((4, 4, 5), np.int32), "uint8, uint16, or floats"),
        (np.full((4, 4, 5), 2.0), "floats from 0 to 1"),
        ("picture.png", "plain picture"),
        ("missing.npy", "no picture at"),
    ],
    ids=["channels", "type", "range", "plain", "missing"],
)
def test_what_is_no_picture_of_five_channels_is_refused(source, words):
    with pytest.raises(ImageError, match=words):
        open_planes(source, channels=5)


def test_an_array_of_objects_is_never_unpickled(tmp_path):
    path = tmp_path / "evil.npy"
    np.save(path, np.array([[object()]], dtype=object), allow_pickle=True)
    with pytest.raises(ImageError, match="cannot be read"):
        open_planes(path, channels=5)


def test_a_stem_that_cannot_be_spread_is_refused():
    words = {
        "use": "hf",
        "config": {"model_type": "siglip2_vision_model", **TOWER, "num_patches": 16},
    }
    del words["config"]["image_size"]
    with pytest.raises(ConfigError, match="cannot be spread"):
        encoders.read(words | {"channels": 5}, origin="vision").load()


def test_planes_are_cropped_like_a_picture():
    planes = Planes(np.zeros((10, 20, 5), np.float32))
    assert planes.size == (20, 10)
    assert planes.crop((2, 3, 7, 9)).size == (5, 6)
