"""Two processes learn what one learns."""

import json

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file

from mmlm.errors import ConfigError
from mmlm.training import train
from mmlm.training.parallel import Engine, missing_processes
from mmlm.training.recipe import RunConfig
from tests.training.launching import group, launch
from tests.training.tiny_run import tiny_recipe, write_rows


def weights(out, stage):
    (folder,) = (out / "checkpoints" / stage).glob("step-*")
    return load_file(folder / "weights.safetensors")


def test_two_processes_learn_what_one_learns(tmp_path):
    # Some rows hold only text: a rank without an image must neither hang nor change the result.
    write_rows(tmp_path, 40, bad=2)
    recipe = tiny_recipe(tmp_path, row_tokens=100)
    train(recipe, tmp_path / "one", quiet=True)
    launch(group((recipe, tmp_path / "two", {}, None)))
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


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_in_one(tmp_path):
    recipe = tiny_recipe(tmp_path, row_tokens=100)
    recipe["stages"] = recipe["stages"][:1]
    train(recipe, tmp_path / "one", quiet=True)
    launch(group((recipe, tmp_path / "two", {}, None)))
    (tmp_path / "two" / "result.json").unlink()
    result = train(recipe, tmp_path / "two", quiet=True)
    assert result.stages[0].steps > 0


def test_one_process_alone_is_not_what_several_were_started_for(monkeypatch):
    Engine(RunConfig(device="cpu"))
    monkeypatch.setitem(PartialState._shared_state, "num_processes", 2)
    with pytest.raises(ConfigError, match="2 processes were started"):
        Engine(RunConfig(sharding="none", device="cpu"))


@pytest.mark.parametrize("sharding", ["auto", "ddp", "fsdp2", "zero1"])
def test_offload_where_nothing_is_kept_in_the_memory_of_the_machine_is_refused(sharding):
    with pytest.raises(ConfigError, match="zero2 or zero3"):
        Engine(RunConfig(sharding=sharding, offload=True, device="cpu"))


@pytest.mark.parametrize("sharding", ["fsdp2", "zero1", "zero2", "zero3"])
def test_a_model_is_spread_only_under_a_launcher(sharding):
    with pytest.raises(ConfigError, match="--processes 1"):
        Engine(RunConfig(sharding=sharding, device="cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named():
    with pytest.raises(ConfigError, match="no CUDA device"):
        Engine(RunConfig(device="cuda"))


def accelerate_environment(*words):
    """What `accelerate launch` gives the one process that it starts itself."""
    from accelerate.commands import launch as launcher
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    given = ["--mixed_precision", "no", "--num_machines", "1", *words, "train.py"]
    arguments = launcher.launch_command_parser().parse_args(given)
    arguments, _, _ = launcher._validate_launch_command(arguments)
    return prepare_simple_launcher_cmd_env(arguments)[1]


@pytest.mark.parametrize(
    ("words", "told"),
    [(["--num_processes", "2"], True), (["--cpu", "--num_processes", "2"], True),
     (["--num_processes", "1"], False)],
)  # fmt: skip
def test_a_process_that_accelerate_started_alone_says_how_to_start_the_others(
    words, told, monkeypatch
):
    for name in ("RANK", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    environment = accelerate_environment(*words)
    said = missing_processes(environment)
    assert (said is not None) == told
    if said:
        assert "--processes N" in said
        assert "--multi_gpu" in said
        assert "\n" not in said
    # A launcher that starts all of them gives each a rank.
    assert missing_processes({**environment, "RANK": "0"}) is None
