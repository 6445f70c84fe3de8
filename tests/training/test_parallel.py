"""Two processes learn what one learns."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmlm.errors import ConfigError
from mmlm.training import train
from mmlm.training.parallel import Engine
from mmlm.training.recipe import RunConfig
from tests.training.tiny_run import tiny_recipe, write_rows

ROOT = Path(__file__).parents[2]
RUN = """
import json, sys
from mmlm.training import train
recipe, out, overrides = json.loads(sys.argv[1])
train(recipe, out, overrides=overrides, quiet=True)
"""


def launch(recipe, out, *, world=2, overrides=()):
    """Run a recipe in several processes, as torchrun would start them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
              "ACCELERATE_USE_CPU": "1"}  # fmt: skip
    words = json.dumps([recipe, str(out), list(overrides)])
    children = [
        subprocess.Popen(
            [sys.executable, "-c", RUN, words],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world)
    ]
    errors = [child.communicate(timeout=300)[1] for child in children]
    assert [child.returncode for child in children] == [0] * world, "\n".join(errors)


def weights(out, stage):
    (folder,) = (out / "checkpoints" / stage).glob("step-*")
    return load_file(folder / "weights.safetensors")


def test_two_processes_learn_what_one_learns(tmp_path):
    # Some rows hold only text: a rank without an image must neither hang nor change the result.
    write_rows(tmp_path, 40, bad=2)
    recipe = tiny_recipe(tmp_path, row_tokens=100)
    train(recipe, tmp_path / "one", quiet=True)
    launch(recipe, tmp_path / "two")
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert len(logs[0]) == len(logs[1])
    for one, two in zip(*logs, strict=True):
        # The same samples, added up in another order.
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["tokens"] == one["tokens"]
    one, two = weights(tmp_path / "one", "instruct"), weights(tmp_path / "two", "instruct")
    for name, value in one.items():
        assert (value - two[name]).abs().mean() < 1e-4, name
    assert (tmp_path / "two" / "model" / "config.json").is_file()
    drops = (tmp_path / "two" / "quarantine.jsonl").read_text().splitlines()
    assert len(drops) == 2 * 2


def test_a_run_of_two_processes_goes_on_in_one(tmp_path):
    recipe = tiny_recipe(tmp_path, row_tokens=100)
    recipe["stages"] = recipe["stages"][:1]
    train(recipe, tmp_path / "one", quiet=True)
    launch(recipe, tmp_path / "two")
    (tmp_path / "two" / "result.json").unlink()
    result = train(recipe, tmp_path / "two", quiet=True)
    assert result.stages[0].steps > 0


@pytest.mark.parametrize("sharding", ["fsdp2", "zero1", "zero2", "zero3"])
def test_what_is_not_built_is_refused_by_name(sharding):
    with pytest.raises(Exception, match="not built"):
        Engine(RunConfig(sharding=sharding, device="cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named():
    with pytest.raises(ConfigError, match="no CUDA device"):
        Engine(RunConfig(device="cuda"))
