"""Moments in 8 bits, gradients in float16, compiled layers: what they keep and what they refuse."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file

import mmlm.training.optim as optim
from mmlm.errors import MissingExtraError
from mmlm.training import train
from mmlm.training.optim import MasterAdamW, eight_bit_adamw
from mmlm.training.parallel import Engine
from mmlm.training.recipe import RunConfig
from tests.training.test_resume import assert_crashes_change_nothing
from tests.training.tiny_run import tiny_recipe

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
NAME = "model.connector.weight"


def optimizer_of(weight, **words):
    return MasterAdamW(
        [(NAME, weight)], engine=Engine(RunConfig(device="cpu")), rates={NAME: 1e-2}, masters={},
        betas=(0.9, 0.99), weight_decay=0.1, **words,
    )  # fmt: skip


def test_a_gradient_that_float16_cannot_hold_is_tried_again_with_half_the_factor():
    weight = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.float16))
    optimizer = optimizer_of(weight)
    assert optimizer.scale == 2.0**16
    tries, moved = 0, False
    while not moved:
        # The gradient is 3; float16 ends at 65,504.
        optimizer.backward((weight * 3).sum())
        norm, moved = optimizer.step(1.0, None, may_move=True)
        tries += 1
        assert moved or optimizer.step_again()
    assert (tries, optimizer.scale) == (3, 2.0**14)
    assert norm == pytest.approx(3 * 4)  # the length of sixteen threes
    assert float(weight[0, 0]) < 1


def test_a_gradient_below_float16_is_not_lost():
    weight = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.float16))
    optimizer = optimizer_of(weight)
    # As a product of two factors, each of which float16 holds.
    optimizer.backward(((weight * 2e-4).float() * 1e-5).sum())
    assert float(optimizer.learnables[0].master.grad[0, 0]) == pytest.approx(2e-9, rel=1e-2)


def test_the_factor_rises_after_many_good_steps_and_is_part_of_a_checkpoint(monkeypatch):
    monkeypatch.setattr(optim, "_STEPS_BEFORE_RAISE", 3)
    weight = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.float16))
    optimizer = optimizer_of(weight)
    for _ in range(4):
        optimizer.backward((weight.float() * 0.1).sum())
        optimizer.step(1.0, None, may_move=True)
    assert optimizer.scale == 2.0**17
    other = optimizer_of(torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.float16)))
    other.restore(optimizer.state())
    assert (other.scale, other._good_steps) == (2.0**17, 4)


def test_a_crashed_run_in_float16_ends_in_the_same_bits(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path, precision="fp16", checkpoint_every=2)
    moments = (("align", 3), ("instruct", 3))
    assert_crashes_change_nothing(recipe, tmp_path, monkeypatch, moments)


@needs_bitsandbytes
def test_moments_in_8_bits_move_as_moments_in_float32_do():
    torch.manual_seed(0)
    start, inputs = torch.randn(64, 128), torch.randn(32, 128)
    found = {}
    for kind in ("adamw", "adamw_8bit"):
        weight = torch.nn.Parameter(start.clone())
        optimizer = optimizer_of(weight, kind=kind)
        for step in range(20):
            optimizer.backward(((inputs + step) @ weight.T).square().mean())
            optimizer.step(1.0, 1.0, may_move=True)
        found[kind] = weight.detach()
        kept = sum(v.numel() * v.element_size() for v in optimizer.state().values())
        per_weight = kept / weight.numel()
        assert per_weight < 2.6 if kind == "adamw_8bit" else per_weight >= 8
    moved = (found["adamw"] - start).abs().mean()
    assert (found["adamw"] - found["adamw_8bit"]).abs().mean() < 0.05 * moved


@needs_bitsandbytes
def test_a_crashed_run_with_moments_in_8_bits_ends_in_the_same_bits(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path, checkpoint_every=2)
    for stage in recipe["stages"]:
        stage["optimizer"] = "adamw_8bit"
    moments = (("align", 3), ("instruct", 3))
    assert_crashes_change_nothing(recipe, tmp_path, monkeypatch, moments)
    (folder,) = (tmp_path / "broken" / "checkpoints" / "instruct").glob("step-*")
    assert load_file(folder / "weights.safetensors")


@pytest.mark.skipif(not needs_bitsandbytes.args[0], reason="bitsandbytes is installed")
def test_moments_in_8_bits_without_their_package_are_refused_by_its_name():
    with pytest.raises(MissingExtraError, match="bitsandbytes"):
        eight_bit_adamw([], (0.9, 0.99))


@pytest.mark.slow
def test_compiled_layers_learn_the_same(tmp_path):
    recipe = tiny_recipe(tmp_path)
    for stage in recipe["stages"]:
        stage["until"] = {"steps": 3}
    losses = []
    for name, words in (("plain", {}), ("compiled", {"run.compile": True})):
        train(recipe, tmp_path / name, overrides=words, quiet=True)
        log = [json.loads(x) for x in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in log])
    # Compiled layers add up in another order.
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
