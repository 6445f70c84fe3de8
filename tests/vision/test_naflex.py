"""SigLIP 2 at native aspect: packed tiles give what the stock tower gives for each alone."""

from __future__ import annotations

import pytest
import torch

from mmlm import load
from mmlm.errors import ConfigError
from mmlm.messages import user
from mmlm.vision import encoders
from mmlm.vision.naflex import patches_of
from tests import tiny

WORDS = {
    "use": "hf",
    "config": {
        "model_type": "siglip2_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "patch_size": 8,
        "num_patches": 16,
    },
}
SIZES = [(32, 32), (8, 56), (24, 40), (32, 32), (40, 24)]


def tiles_of(sizes=SIZES) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(3, *size, generator=draw) for size in sizes]


@pytest.mark.parametrize("layer", [-2, "last", -1])
def test_packed_tiles_are_what_the_padded_stock_tower_gives(layer):
    torch.manual_seed(0)
    encoder = encoders.read(WORDS | {"layer": layer}, origin="vision").load()
    tiles = tiles_of()
    patches = [patches_of(tile, 8) for tile in tiles]
    longest = max(map(len, patches))
    padded = torch.stack([
        torch.nn.functional.pad(each, (0, 0, 0, longest - len(each))) for each in patches
    ])  # fmt: skip
    mask = torch.stack([torch.arange(longest) < len(each) for each in patches]).int()
    shapes = torch.tensor([(tile.shape[1] // 8, tile.shape[2] // 8) for tile in tiles])
    with torch.no_grad():
        ours = encoder.encode_tiles(tiles)
        encoder.tower.set_attn_implementation("sdpa")
        out = encoder.tower(
            pixel_values=padded, pixel_attention_mask=mask, spatial_shapes=shapes,
            output_hidden_states=True,
        )  # fmt: skip
    theirs = out.last_hidden_state if layer == "last" else out.hidden_states[layer]
    for item, row, length in zip(ours.items(), theirs, mask.sum(1), strict=True):
        # Padded rows add up in another order: 2e-6 was seen; wrong positions differ by 0.1.
        torch.testing.assert_close(item, row[:length], rtol=0, atol=2e-5)


def test_a_tile_does_not_see_the_others():
    encoder = encoders.read(WORDS, origin="vision").load()
    tiles = tiles_of()
    with torch.no_grad():
        before = encoder.encode_tiles(tiles).items()
        after = encoder.encode_tiles([tiles[0] + 1, *tiles[1:]]).items()
    assert not after[0].equal(before[0])
    for one, other in zip(before[1:], after[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_pictures_of_any_proportions_go_through_a_whole_model(tmp_path):
    made = tiny.compose_tiny(
        tmp_path,
        eye=WORDS | {"layer": "last"},
        image={"use": "native", "rule": "fit", "max_tokens": 9},
        reducer={"use": "pixel_shuffle"},
    )
    pictures = [tiny.picture(1, 30, 90), tiny.picture(2, 50, 50)]
    encoded = made.processor.encode_chat([user("What?", pictures)], add_generation_prompt=True)
    # A cell is a square of 2 x 2 patches: at most nine tokens each.
    assert [last - first for first, last in encoded.image_spans] == [8, 9]
    given = {
        "input_ids": torch.tensor([encoded.ids]),
        "pixel_values": encoded.pixel_values,
        **made.processor.image_processor.sizes(encoded.image_sizes),
    }
    made.model(**given, labels=given["input_ids"]).loss.backward()
    assert made.model.model.vision.tower.embeddings.position_embedding.weight.grad.any()
    made.save(tmp_path / "saved")
    back = load(tmp_path / "saved", device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(
            back.model(**given).logits, made.model(**given).logits, rtol=0, atol=0
        )


def test_a_layer_beyond_the_tower_is_refused():
    with pytest.raises(ConfigError, match="4 hidden states"):
        encoders.read(WORDS | {"layer": 7}, origin="vision").load()
