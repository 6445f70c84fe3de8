"""An encoder that learns from a frozen teacher."""

import json

import pytest
import torch
from safetensors.torch import load_file

from mmlm.data import open_mixture
from mmlm.data.pipeline import PreparedRow
from mmlm.data.planning import Planner
from mmlm.errors import ConfigError
from mmlm.features import Grid
from mmlm.training import train
from mmlm.training.batches import Batcher
from mmlm.training.distillation import DistillationConfig, features_apart, on_grid
from mmlm.training.learning import freeze
from tests.tiny import compose_tiny, save_vision
from tests.training.tiny_run import tiny_recipe, write_rows

RTOL = 2e-5


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distil")
    write_rows(folder, 8)
    assistant = compose_tiny(folder)
    mixture = open_mixture("rows.jsonl", folder=folder)
    planner = Planner(mixture, assistant.processor, max_tokens=4096, max_tiles=64)
    return folder, assistant, [planner.plan(position) for position in range(6)]


def teacher(folder, kind, layer=-2, seed=9):
    place = folder / f"teacher-{kind}-{seed}"
    if not place.exists():
        save_vision(place, kind, seed=seed)
    return {"use": "hf", "checkpoint": str(place), "layer": layer}


def gradients(scene, objective, cut):
    _, assistant, samples = scene
    freeze(assistant.model, {"vision.*": 1.0, "language.*": 1.0})
    device = torch.device("cpu")
    batcher = Batcher(assistant.model, assistant.processor, packed=True, cache=None, device=device)
    count = sum(objective.weigh([sample])[1] for sample in samples)
    assistant.model.zero_grad()
    total, waiting = 0.0, list(samples)
    for number in cut:
        mine, waiting = waiting[:number], waiting[number:]
        row = PreparedRow(mine, [batcher.pixels(i) for one in mine for i in one.images])
        inputs = batcher.inputs(row, objective.weigh(mine)[0])
        loss = objective.loss(assistant.model, inputs, count)
        if loss.requires_grad:
            loss.backward()
        total += float(loss)
    named = assistant.model.named_parameters()
    return total, {n: p.grad.clone() for n, p in named if p.grad is not None}


def test_an_encoder_agrees_with_itself_and_not_with_another_layer(scene):
    folder, _, _ = scene
    own = {"use": "hf", "checkpoint": str(folder / "clip"), "layer": -2}
    for compare in ("cosine", "mse", "relations"):
        same = DistillationConfig(teacher=own, compare=compare).build(loss_weight="token")
        assert gradients(scene, same, [6])[0] == pytest.approx(0.0, abs=1e-5)
        other = DistillationConfig(teacher={**own, "layer": 0}, compare=compare)
        assert gradients(scene, other.build(loss_weight="token"), [6])[0] > 1e-3


@pytest.mark.parametrize("next_token", [0.0, 0.5])
def test_micro_batches_change_nothing(scene, next_token):
    config = DistillationConfig(teacher=teacher(scene[0], "dinov2"), next_token=next_token)
    objective = config.build(loss_weight="token")
    total, whole = gradients(scene, objective, [6])
    assert any("model.language" in name for name in whole) == bool(next_token)
    for cut in ([3, 3], [1, 2, 3]):
        parts_total, parts = gradients(scene, objective, cut)
        assert parts_total == pytest.approx(total, rel=RTOL)
        largest = max(float(one.abs().max()) for one in whole.values())
        for name, one in whole.items():
            torch.testing.assert_close(parts[name], one, rtol=0, atol=RTOL * largest)


def test_a_stage_teaches_the_encoder_and_nothing_else(tmp_path):
    stage = {
        "name": "see", "learn": ["vision.*"], "data": str(write_rows(tmp_path, 20)),
        "objective": {"use": "distillation", "teacher": teacher(tmp_path, "siglip")},
        "until": {"epochs": 3}, "step_tokens": 256, "peak_lr": 3e-3,
    }  # fmt: skip
    done = train(tiny_recipe(tmp_path, stages=[stage]), tmp_path / "run", quiet=True)
    rows = [json.loads(x) for x in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    (weights,) = (tmp_path / "run" / "checkpoints").glob("see/*/weights.safetensors")
    assert all(name.startswith("model.vision.") for name in load_file(weights))
    assert done.stages[0].steps >= len(rows)


def test_a_frozen_encoder_is_refused(tmp_path):
    stage = {
        "name": "see", "learn": ["connector.*"], "data": str(write_rows(tmp_path, 8)),
        "objective": {"use": "distillation", "teacher": teacher(tmp_path, "siglip")},
        "until": {"steps": 1}, "step_tokens": 256,
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"must name\s+vision"):
        train(tiny_recipe(tmp_path, stages=[stage]), tmp_path / "run", quiet=True)


def test_relations_need_no_common_width_and_grids_are_brought_together():
    torch.manual_seed(0)
    small, large = torch.randn(16, 8), torch.randn(64, 24)
    moved = on_grid(large, Grid(1, 8, 8), Grid(1, 4, 4))
    assert moved.shape == (16, 24)
    assert float(features_apart(small, moved, "auto")) > 0
    turned = small @ torch.linalg.qr(torch.randn(8, 8))[0]
    assert float(features_apart(small, turned, "relations")) == pytest.approx(0, abs=1e-10)
    with pytest.raises(ConfigError, match="compare: relations"):
        features_apart(small, moved, "mse")
