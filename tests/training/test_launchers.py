"""A recipe runs in two processes under each launcher that is installed."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import mmlm.cli.launch as launching
from mmlm.cli.main import find_command
from mmlm.errors import UsageError
from tests.training.tiny_run import tiny_recipe

ROOT = Path(__file__).parents[2]
PYTHON = [sys.executable, "-m"]
LAUNCHERS = {
    "torchrun": [*PYTHON, "torch.distributed.run", "--nproc-per-node", "2", "-m", "mmlm"],
    # With --cpu it would start one process, and leave more of them to MPI.
    "accelerate": [
        *PYTHON, "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--num_cpu_threads_per_process", "1", "--module", "mmlm",
    ],
    "deepspeed": [
        *PYTHON, "deepspeed.launcher.runner", "--no_local_rank", "--num_gpus", "2",
        "--module", "mmlm",
    ],
}  # fmt: skip


# Longer than a signal takes to arrive on a busy machine.
LONG = {"steps": 150}


def environment():
    words = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    paths = [str(ROOT), str(Path(sys.executable).parent)]
    words["PYTHONPATH"] = os.pathsep.join(filter(None, [paths[0], os.environ.get("PYTHONPATH")]))
    words["PATH"] = os.pathsep.join([paths[1], os.environ["PATH"]])
    return words


def write_recipe(folder, until=None, **run):
    recipe = tiny_recipe(folder, row_tokens=100, **run)
    recipe["stages"] = recipe["stages"][:1]
    recipe["stages"][0]["until"] = until or recipe["stages"][0]["until"]
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def run(command, folder):
    return subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, check=False,
        timeout=600,
    )  # fmt: skip


# Two processes that import torch and transformers cost 20 s of one core each time.
@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate", "deepspeed"])
def test_a_recipe_runs_under_each_launcher(tmp_path, launcher):
    if importlib.util.find_spec({"torchrun": "torch"}.get(launcher, launcher)) is None:
        pytest.skip(f"{launcher} is not installed")
    path = write_recipe(tmp_path)
    done = run([*LAUNCHERS[launcher], "train", str(path), "--out", str(tmp_path / "run")], tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "2 processes, ddp" in done.stdout
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["stages"][0]["steps"] > 1


@pytest.mark.slow
def test_one_process_where_accelerate_was_asked_for_two_says_so(tmp_path):
    path = write_recipe(tmp_path)
    words = [word for word in LAUNCHERS["accelerate"] if word != "--multi_gpu"]
    done = run([*words, "train", str(path), "--dry-run"], tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "accelerate was asked for several processes and started one" in done.stdout


@pytest.mark.slow
def test_mmlm_train_starts_processes_itself_and_stops_gently(tmp_path):
    path, out = write_recipe(tmp_path, LONG, checkpoint_minutes=100.0), tmp_path / "run"
    command = [*PYTHON, "mmlm", "train", str(path), "--out", str(out), "--processes", "2"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip
    log = out / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text()):
        time.sleep(0.01)
    # As a terminal does on Ctrl-C: to all processes in the foreground.
    os.killpg(process.pid, signal.SIGINT)
    told = process.communicate(timeout=600)[0]
    assert process.returncode == 1, told
    assert "the same command goes on from there" in told
    assert list((out / "checkpoints" / "align").glob("step-*"))
    done = run(command, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes, ddp" in done.stdout
    assert "going on    after step" in done.stdout


@pytest.mark.slow
def test_the_slurm_script_trains_stops_before_its_time_ends_and_goes_on(tmp_path):
    """The script itself runs; what SLURM gives it - nodes, `srun` - is given here for one node."""
    path, out = write_recipe(tmp_path, LONG, checkpoint_minutes=100.0), tmp_path / "run"
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {
        "scontrol": "echo 127.0.0.1", "srun": 'exec "$@"',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    }.items():  # fmt: skip
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    words = environment()
    words |= {"SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "7",
              "SLURM_GPUS_ON_NODE": "2"}  # fmt: skip
    words["PATH"] = os.pathsep.join([str(programs), words["PATH"]])
    command = ["bash", str(ROOT / "train" / "slurm.sh"), str(path), "--out", str(out)]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    log = out / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text()):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)  # as `--signal=B:TERM@300`: to the script alone
    told = process.communicate(timeout=600)[0]
    assert process.returncode != 0, told
    assert list((out / "checkpoints" / "align").glob("step-*")), told
    done = subprocess.run(
        command, cwd=tmp_path, env=words, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "going on    after step" in done.stdout


def test_a_process_that_fails_alone_is_told_and_ends_the_others(capfd, monkeypatch):
    script = (
        "import os, sys, time\n"
        "if os.environ['RANK'] == '1': sys.exit('the second one has no disk')\n"
        "print('first of', os.environ['WORLD_SIZE'], flush=True); time.sleep(600)"
    )
    monkeypatch.setattr(launching, "_SECONDS_TO_END", 0.5)
    assert launching.launch([sys.executable, "-c", script], 2) == 1
    told = capfd.readouterr()
    assert "first of 2" in told.out
    assert "process 1 of 2 failed" in told.err
    assert "the second one has no disk" in told.err


@pytest.mark.parametrize("word", ["none", "0", "-2"])
def test_a_wrong_number_of_processes_is_refused_in_words(word):
    with pytest.raises(UsageError, match="no number of processes"):
        find_command("train").read(["x.yaml", f"--processes={word}"])
