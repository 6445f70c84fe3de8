"""The lower layers of a tuned encoder run once for each picture, and nothing else changes."""

import json

import pytest
import torch

from mmlm.errors import ConfigError
from mmlm.training import train
from mmlm.training.trunk import find_trunk
from mmlm.vision import encoders
from tests.tiny import save_vision
from tests.training.tiny_run import tiny_recipe

RESNET = {"use": "timm", "checkpoint": "resnet10t", "pretrained": False, "side_px": 64}
VIT = {
    "use": "timm", "checkpoint": "vit_tiny_patch16_224", "pretrained": False, "side_px": 32,
    "arguments": {"depth": 3, "embed_dim": 24, "num_heads": 2},
}  # fmt: skip


def tuned(words, *marks):
    encoder = encoders.read(words, origin="model.vision").load()
    names = {n for n, _ in encoder.named_parameters() if any(mark in n for mark in marks)}
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(name in names)
    return encoder, names


@pytest.mark.parametrize(
    ("words", "marks", "last"),
    [
        (VIT, ("blocks.2.",), "blocks.1"),
        ({**RESNET, "feature": "final"}, ("layer4",), "layer3"),
        (RESNET, ("layer3", "layer4"), "layer2"),
        ("clip", ("layers.1.", "post_layernorm"), "layers.0"),
    ],
)
def test_the_upper_layers_go_on_from_what_was_kept(tmp_path, words, marks, last):
    if words == "clip":
        save_vision(tmp_path)
        words = {"use": "hf", "checkpoint": str(tmp_path), "layer": -1}
    encoder, names = tuned(words, *marks)
    trunk = find_trunk(encoder, names)
    assert trunk is not None
    assert trunk.names[-1].endswith(last)
    pixels = torch.randn(3, 3, *encoder.facts.side)
    whole = encoder(pixels)
    whole.values.square().mean().backward()
    wanted = {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}
    encoder.zero_grad()
    with trunk.installed():
        kept = trunk.below(pixels)
        found = encoder(kept)
        assert torch.equal(encoder(pixels).values, whole.values)  # pixels are still taken
    assert kept.shape == (3, *trunk.shape)
    assert torch.equal(found.values, whole.values)
    found.values.square().mean().backward()
    gradients = {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}
    assert gradients.keys() == wanted.keys()
    assert wanted
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)
    assert "forward" not in vars(encoder)


@pytest.mark.parametrize("marks", [(), ("patch_embed",), ("pos_embed", "blocks.2."), ("",)])
def test_there_is_none_where_the_first_layers_learn_or_nothing_does(marks):
    encoder, names = tuned(VIT, *marks)
    assert find_trunk(encoder, names) is None


def test_there_is_none_where_much_more_would_be_kept_than_the_pixels():
    wide = {"depth": 3, "embed_dim": 128, "num_heads": 2, "patch_size": 4}
    encoder, names = tuned({**VIT, "arguments": wide}, "blocks.2.")
    assert find_trunk(encoder, names) is None


def test_an_encoder_that_hands_on_more_than_its_last_layer_is_run_whole():
    """A sum with the first layer, past the trunk, is seen by the trial."""
    encoder, names = tuned(VIT, "blocks.2.")
    network = encoder.tower.timm_model
    network.norm.register_forward_pre_hook(lambda module, given: (given[0] + network.first_seen,))
    network.patch_embed.register_forward_hook(
        lambda module, given, output: setattr(network, "first_seen", output.mean())
    )
    assert find_trunk(encoder, names) is None


def losses(folder):
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def run(folder, name, cache, learn):
    stage = {"name": "tune", "learn": learn, "data": str(folder / "rows.jsonl"),
             "until": {"epochs": 2}, "step_tokens": 256}  # fmt: skip
    recipe = tiny_recipe(folder, stages=[stage], feature_cache=cache)
    recipe["model"]["vision"]["layer"] = -1
    return train(recipe, out=folder / name, quiet=True)


LEARN = {"connector.*": 1e-2, "vision.*[1:]": 1e-2}


def test_a_stage_learns_the_same_with_what_was_kept(tmp_path, monkeypatch):
    from mmlm.training.trunk import Trunk

    passes = []
    lower = Trunk.below
    monkeypatch.setattr(Trunk, "below", lambda *given: passes.append(1) or lower(*given))
    run(tmp_path, "plain", "off", LEARN)
    assert not passes
    run(tmp_path, "kept", "auto", LEARN)
    assert passes
    plain, kept = losses(tmp_path / "plain"), losses(tmp_path / "kept")
    assert len(plain) > 2
    assert kept == pytest.approx(plain, rel=1e-4)
    first = len(passes)
    run(tmp_path, "again", "auto", LEARN)
    assert len(passes) == first + 1  # the trial alone: every picture was known
    assert losses(tmp_path / "again") == kept


def test_a_cache_that_is_asked_for_says_when_nothing_stands_still(tmp_path):
    with pytest.raises(ConfigError, match="no lower layers that stand still"):
        run(tmp_path, "all", "on", {"vision.*": 1e-3})
