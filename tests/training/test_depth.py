"""Layers by their depth: slices in `learn`, layer-wise decay, drop-path."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mmlm.errors import ConfigError
from mmlm.training import train
from mmlm.training.depth import blocks_of, drop_path, split_slice, with_layer_decay
from mmlm.training.learning import matching, public_name
from tests.tiny import compose_tiny
from tests.training.tiny_run import tiny_recipe, write_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return compose_tiny(tmp_path_factory.mktemp("depth")).model


def test_a_slice_names_layers_and_nothing_else(model):
    chosen = matching(model, {"vision.*[1:]": 1.0, "language.*[:1]": 1.0})
    public = sorted(public_name(name) for name in chosen)
    assert public
    numbers = {
        (name.split(".")[0], int(next(w for w in name.split(".") if w.isdigit())))
        for name in public
    }
    assert numbers == {("vision", 1), ("vision", 2), ("language", 0)}
    with pytest.raises(ConfigError, match="matches no parameter"):
        matching(model, {"vision.*[40:]": 1.0})
    assert split_slice("vision.*[a:]")[1] is None


def test_rates_fall_towards_the_input_and_the_connector_keeps_its_own():
    public = {
        "a": "vision.embeddings.w", "b": "vision.layers.0.w", "c": "vision.layers.2.w",
        "d": "vision.norm.w", "e": "connector.layers.0.w", "f": "adapters.language.layers.1.w",
        "g": "adapters.language.layers.0.w",
    }  # fmt: skip
    rates = with_layer_decay(dict.fromkeys(public, 1.0), public, 0.5)
    assert rates == {"a": 0.125, "b": 0.25, "c": 1.0, "d": 1.0, "e": 1.0, "f": 1.0, "g": 0.5}
    assert with_layer_decay({"a": 1.0}, public, None) == {"a": 1.0}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, states):
        return states + self.weight


def test_layers_are_left_out_in_training_alone_and_the_mean_stays():
    torch.manual_seed(0)
    encoder = nn.Sequential(*[Block() for _ in range(4)])
    tiles = torch.zeros(20_000, 3)
    with drop_path(encoder, 0.4):
        seen = encoder.train()(tiles)
        assert torch.equal(encoder.eval()(tiles), torch.full_like(tiles, 4.0))
    # Each tile loses layers as a whole; the mean of 20,000 tiles is within 1 % of four layers.
    assert torch.equal(seen[:, 0], seen[:, 2])
    assert float(seen.mean()) == pytest.approx(4.0, rel=0.01)
    assert float(seen.std()) > 0.5
    assert torch.equal(encoder.train()(tiles), torch.full_like(tiles, 4.0))


def test_a_stage_with_decay_and_drop_path_learns_the_layers_it_names(tmp_path, model):
    assert len(blocks_of(model.model.vision)) >= 2
    stage = {
        "name": "see", "learn": ["vision.*[1:]", "connector.*"], "layer_decay": 0.5,
        "drop_path": 0.5, "data": str(write_rows(tmp_path, 12)), "until": {"epochs": 1},
        "step_tokens": 256,
    }  # fmt: skip
    for name in ("one", "two"):
        train(tiny_recipe(tmp_path, stages=[stage]), tmp_path / name, quiet=True)
    (path,) = (tmp_path / "one" / "checkpoints").glob("see/*/weights.safetensors")
    assert not [n for n in load_file(path) if "vision" in n and ".0." in n]
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("one", "two")]
    # Which layers are left out hangs on the step alone, so the same run is the same.
    assert [json.loads(x)["loss"] for x in logs[0]] == [json.loads(x)["loss"] for x in logs[1]]


def test_drop_path_of_a_frozen_encoder_is_refused(tmp_path):
    stage = {
        "name": "a", "learn": ["connector.*"], "drop_path": 0.1,
        "data": str(write_rows(tmp_path, 8)), "until": {"steps": 1}, "step_tokens": 256,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="stands still"):
        train(tiny_recipe(tmp_path, stages=[stage]), tmp_path / "run", quiet=True)
