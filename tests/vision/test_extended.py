"""Registers, tokens for each channel, and heads that look: added to a ViT, and what they change."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModel

from mmlm.errors import ConfigError
from mmlm.features import Grid, Size
from mmlm.vision import encoders
from mmlm.vision.looking import looks

TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 5 * 2,
    "image_size": 32,
    "patch_size": 8,
}
CLIP = {"use": "hf", "layer": "last", "config": {"model_type": "clip_vision_model", **TOWER}}
CLIP["config"] |= {"hidden_size": 40}
DINO = {"use": "hf", "layer": "last", "config": {"model_type": "dinov2", **TOWER, "mlp_ratio": 2}}
DINO["config"] |= {"hidden_size": 40}
TIMM_VIT = {"use": "timm", "checkpoint": "test_vit", "pretrained": False, "side_px": 64}


def made(encoder: dict, **words):
    torch.manual_seed(0)
    return encoders.read({"use": "extended", "encoder": encoder, **words}, origin="vision").load()


def pixels(channels: int = 3, side: int = 32, count: int = 2) -> torch.Tensor:
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(1))


def test_registers_are_those_of_a_tower_that_has_them():
    """A DINOv2 with registers of its own gives what one gets that they are added to."""
    words = {key: value for key, value in DINO["config"].items() if key != "model_type"}
    own = AutoConfig.for_model("dinov2_with_registers", **words, num_register_tokens=3)
    torch.manual_seed(1)
    theirs = AutoModel.from_config(own).eval()
    ours = made(DINO, registers=3)
    state = {name: weight for name, weight in theirs.state_dict().items() if "register" not in name}
    ours.encoder.tower.load_state_dict(state)
    with torch.no_grad():
        theirs.embeddings.register_tokens.copy_(torch.randn(1, 3, 40))
        ours.registers.copy_(theirs.embeddings.register_tokens[0])
        wanted = theirs(pixels()).last_hidden_state[:, 4:].reshape(-1, 40)
        got = ours(pixels()).values
    # Attention adds up the same tokens in another order.
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("encoder", [CLIP, DINO, TIMM_VIT], ids=["clip", "dinov2", "timm"])
def test_registers_move_the_features_and_learn(encoder):
    if encoder["use"] == "timm":
        pytest.importorskip("timm")
    side = encoder.get("side_px", 32)
    with_them, without = made(encoder, registers=4), made(encoder)
    without.load_state_dict(
        {name: weight for name, weight in with_them.state_dict().items() if name != "registers"}
    )
    got, plain = with_them(pixels(side=side)), without(pixels(side=side))
    assert got.grids == plain.grids
    assert (got.values - plain.values).abs().max() > 1e-5
    (got.values * torch.randn_like(got.values)).sum().backward()
    assert with_them.registers.grad.abs().sum() > 0


def test_one_channel_with_tokens_is_the_vit_of_one_channel():
    ours = made(CLIP, channel_tokens=1)
    with torch.no_grad():
        ours.channel_embedding.zero_()
        assert torch.equal(ours(pixels(1)).values, ours.encoder(pixels(1)).values)


def test_each_channel_has_tokens_that_see_the_others():
    ours = made(DINO, channel_tokens=4)
    given = pixels(4)
    out = ours(given)
    assert out.grids == (Grid(4, 4, 4),) * 2
    assert ours.facts.out_grid(Size(48, 40)) == Grid(4, 6, 5)
    changed = given.clone()
    changed[:, 2] = 0
    with torch.no_grad():
        difference = (ours(changed).values - out.values).abs().amax(-1).view(2, 4, 16).amax(-1)
    assert (difference > 1e-6).all()  # attention spans the channels
    # What a channel is follows from its vector alone: channels change places with their vectors.
    order = [2, 0, 3, 1]
    with torch.no_grad():
        ours.channel_embedding.copy_(ours.channel_embedding[order].clone())
        moved = ours(given[:, order]).values.view(2, 4, 16, -1)
    torch.testing.assert_close(moved, out.values.view(2, 4, 16, -1)[:, order], rtol=1e-4, atol=1e-5)


def test_sampled_channels_leave_zeros_where_the_others_were_shown():
    ours = made(CLIP, channel_tokens=6, sample_channels=True).train()
    torch.manual_seed(0)
    counts = set()
    for _ in range(8):
        maps = ours(pixels(6, count=1)).values.view(6, -1)
        counts.add(int((maps != 0).any(-1).sum()))
        assert ours(pixels(6, count=1)).grids == (Grid(6, 4, 4),)
    assert len(counts) > 2
    assert max(counts) <= 6
    full = ours.eval()(pixels(6, count=1)).values.view(6, -1)
    assert (full != 0).any(-1).all()


def naive_looks(heads: int, rows: int, columns: int, tokens: int) -> torch.Tensor:
    """The definition, written as loops."""
    prefix = tokens % (rows * columns)
    ways = [(-1, 0), (0, 1), (1, 0), (0, -1), None]
    out = torch.zeros(heads, tokens, tokens)
    for head in range(heads):
        way, slope = ways[head % 5], 0.5 ** (head // 5 + 1)
        for query in range(prefix, tokens):
            for key in range(prefix, tokens):
                one = divmod((query - prefix) % (rows * columns), columns)
                other = divmod((key - prefix) % (rows * columns), columns)
                step = (other[0] - one[0], other[1] - one[1])
                far = (step[0] ** 2 + step[1] ** 2) ** 0.5
                out[head, query, key] = -slope * far
                if way is not None and step[0] * way[0] + step[1] * way[1] < 0:
                    out[head, query, key] = float("-inf")
    return out


@pytest.mark.parametrize("tokens", [6, 7, 13], ids=["bare", "prefix", "two maps and a prefix"])
def test_heads_look_where_the_definition_says(tokens):
    torch.testing.assert_close(looks(7, 2, 3, tokens), naive_looks(7, 2, 3, tokens))


def test_looking_tells_places_without_a_table():
    ours = made(DINO, positions="lookhere")
    plain = made(DINO)
    table = "encoder.tower.embeddings.position_embeddings"
    assert table in ours.idle_parameters()
    assert not dict(ours.named_parameters())[table].any()
    # The same patch everywhere: only where a place is can tell its features apart.
    same = torch.ones(1, 3, 8, 8).mul(0.3).tile(1, 1, 4, 4)
    with torch.no_grad():
        dict(plain.named_parameters())[table].zero_()
        blind = plain(same).values
        # Attention to equal values is the same whatever the weights; a second patch breaks that.
        same[..., :8, :8] = -0.8
        seeing = ours(same).values.view(4, 4, -1)
        blind = plain(same).values.view(4, 4, -1)
    torch.testing.assert_close(blind[1, 1], blind[3, 2], rtol=1e-4, atol=1e-5)
    assert (seeing[1, 1] - seeing[3, 2]).abs().max() > 1e-4
    # And it holds at sizes that the table was never resized to.
    assert ours(pixels(side=64)).grids == (Grid(1, 8, 8),) * 2


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        ({"encoder": {"use": "patches"}, "registers": 1}, "hf` or `timm` ViT"),
        ({"encoder": TIMM_VIT, "positions": "lookhere"}, "needs the attention"),
        ({"encoder": CLIP, "sample_channels": True}, "needs channel_tokens"),
        ({"encoder": TIMM_VIT | {"checkpoint": "test_convnext"}, "registers": 2}, "ViT"),
        (
            {"encoder": {"use": "hf", "config": {**TOWER, "model_type": "siglip2_vision_model",
                                                 "num_patches": 16, "hidden_size": 40}},
             "registers": 2},
            "packs its tiles",
        ),
    ],
    ids=["patches", "timm looks", "sampling", "convnet", "naflex"],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_the_reason(words, cause):
    with pytest.raises(ConfigError, match=cause):
        encoders.read({"use": "extended", **words}, origin="vision").load()
