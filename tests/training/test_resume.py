"""However a run is ended, the same command ends in the same bits."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

import mmlm.training.checkpoint as checkpoints
from mmlm.errors import TrainingError
from mmlm.training import train
from mmlm.training.checkpoint import (
    Checkpoint,
    last_checkpoint,
    load_checkpoint,
    random_state,
    save_checkpoint,
)
from mmlm.training.stage import StageRun
from tests.training.test_distillation import teacher
from tests.training.test_preference import write_pairs
from tests.training.tiny_run import tiny_recipe, write_rows

ROOT = Path(__file__).parents[2]
TIMES = ("seconds", "useful_tokens_per_second", "seconds_left", "mfu", "memory_gib")


def bits(out):
    """Everything that a run computed: the bytes of the model and of each stage, and its log."""
    found = {"model": (out / "model" / "model.safetensors").read_bytes()}
    for file in sorted((out / "checkpoints").glob("*/step-*/weights.safetensors")):
        found[str(file.relative_to(out))] = file.read_bytes()
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    found["log"] = [{k: v for k, v in row.items() if k not in TIMES} for row in log]
    for name in ("growth.jsonl", "quarantine.jsonl"):
        found[name] = (out / name).read_bytes() if (out / name).exists() else b""
    return found


def assert_same_bits(one, other):
    first, second = bits(one), bits(other)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


class StopHereError(Exception):
    """Ends a run as a crash would: nothing is saved."""


def crash_at(monkeypatch, stage, step):
    """End the run in the middle of one step of one stage."""
    learn = StageRun._learn

    def learn_or_crash(self, batch, factor):
        if self.stage.name == stage and self.step == step:
            raise StopHereError
        return learn(self, batch, factor)

    monkeypatch.setattr(StageRun, "_learn", learn_or_crash)


def assert_crashes_change_nothing(recipe, folder, monkeypatch, moments):
    """Run unbroken, and once more with a crash at each stage and step; compare the bits."""
    train(recipe, folder / "unbroken", quiet=True)
    for stage, step in moments:
        with monkeypatch.context() as patch:
            crash_at(patch, stage, step)
            with pytest.raises(StopHereError):
                train(recipe, folder / "broken", quiet=True)
    train(recipe, folder / "broken", quiet=True)
    assert_same_bits(folder / "unbroken", folder / "broken")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_that_crashed_in_each_stage_ends_in_the_same_bits(tmp_path, monkeypatch, precision):
    write_rows(tmp_path, 40, bad=2)
    recipe = tiny_recipe(
        tmp_path, checkpoint_every=2, precision=precision,
        ask={"every_steps": 3, "num": 2, "max_new_tokens": 2},
    )  # fmt: skip
    moments = (("align", 1), ("align", 5), ("instruct", 0), ("instruct", 7))
    assert_crashes_change_nothing(recipe, tmp_path, monkeypatch, moments)


def test_a_run_killed_at_random_moments_ends_in_the_same_bits(tmp_path):
    recipe = tiny_recipe(tmp_path, checkpoint_every=1)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    kills = int(os.environ.get("MMLM_TEST_KILLS", "4"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.kill_often", str(tmp_path / "recipe.json"),
         str(tmp_path), str(kills)],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split("\n")
    assert lines[0] == "unbroken 0", done.stdout
    assert "finished 0" in lines, done.stdout
    assert f"killed {signal.SIGKILL}" in lines, "no child was killed while it ran"
    assert_same_bits(tmp_path / "unbroken", tmp_path / "killed")


@pytest.mark.slow
def test_twenty_kills_over_every_kind_of_stage_change_no_bit(tmp_path):
    pytest.importorskip("peft", reason="one of the stages learns adapters")
    write_rows(tmp_path, 40, bad=2)
    # Of the eight pairs two are none.
    recipe = tiny_recipe(tmp_path, checkpoint_every=1, drop_budget=0.5)
    align, instruct = recipe["stages"]
    few = {"until": {"steps": 10}}
    lora = {"learn": ["adapters.*", "connector.*"], "adapters": {"use": "lora", "dropout": 0.1}}
    see = {"objective": {"use": "distillation", "teacher": teacher(tmp_path, "siglip")}}
    prefer = {**lora, "learn": ["adapters.*"], "objective": {"use": "preference"},
              "step_tokens": 600, "peak_lr": 1e-3,
              "data": {"use": "pairs", "path": str(write_pairs(tmp_path))}}  # fmt: skip
    recipe["stages"] = [
        {**align, **few, "name": "words", "objective": {"use": "word_match"}},
        {**align, **few},
        {**align, **few, **see, "name": "see", "learn": ["vision.*"]},
        {**instruct, **few, "name": "all", "learn": ["vision.*", "connector.*", "language.*"],
         "drop_path": 0.2},
        {**instruct, **few, **lora, "name": "lora", "peak_lr": 1e-3},
        {**instruct, **few, **prefer, "name": "prefer"},
        {**instruct, **few},
    ]  # fmt: skip
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    kills = os.environ.get("MMLM_TEST_KILLS", "60")  # or until it is finished
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.kill_often", str(tmp_path / "recipe.json"),
         str(tmp_path), kills],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split("\n")
    assert "finished 0" in lines, done.stdout
    killed = lines.count(f"killed {signal.SIGKILL}")
    assert killed >= min(20, int(kills) - 1), done.stdout
    if int(kills) >= 60:
        assert {f"in {stage['name']}" for stage in recipe["stages"]} <= set(lines), done.stdout
    assert_same_bits(tmp_path / "unbroken", tmp_path / "killed")


def test_ctrl_c_saves_and_the_same_call_goes_on(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path)
    train(recipe, tmp_path / "unbroken", quiet=True)
    learn, handler = StageRun._learn, signal.getsignal(signal.SIGINT)

    def learn_and_interrupt(self, batch, factor):
        if self.stage.name == "instruct" and self.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        return learn(self, batch, factor)

    with monkeypatch.context() as patch:
        patch.setattr(StageRun, "_learn", learn_and_interrupt)
        with pytest.raises(KeyboardInterrupt, match="instruct after step 4"):
            train(recipe, tmp_path / "broken", quiet=True)
    assert last_checkpoint(tmp_path / "broken" / "checkpoints" / "instruct").name == "step-00000004"
    assert signal.getsignal(signal.SIGINT) is handler
    train(recipe, tmp_path / "broken", quiet=True)
    assert_same_bits(tmp_path / "unbroken", tmp_path / "broken")


def test_a_run_in_a_thread_leaves_signals_alone(tmp_path):
    recipe = tiny_recipe(tmp_path)
    recipe["stages"] = recipe["stages"][:1]
    found = []
    thread = threading.Thread(
        target=lambda: found.append(train(recipe, tmp_path / "run", quiet=True))
    )
    thread.start()
    thread.join()
    assert found[0].stages[0].steps > 0


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path, checkpoint_every=2)
    train(recipe, tmp_path / "unbroken", quiet=True)
    write = checkpoints.save_file

    def full(tensors, path):
        if "step-00000006" in str(path) and path.name.startswith("optimizer"):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", full)
        with pytest.raises(TrainingError, match=r"No space left.*last good one is step-00000004"):
            train(recipe, tmp_path / "broken", quiet=True)
    folder = tmp_path / "broken" / "checkpoints" / "align"
    assert [path.name for path in folder.iterdir()] == ["step-00000004"]
    train(recipe, tmp_path / "broken", quiet=True)
    assert_same_bits(tmp_path / "unbroken", tmp_path / "broken")


def checkpoint(step):
    import torch

    weights = {"a": torch.full((3,), float(step))}
    return Checkpoint({"step": step}, weights, {"a//exp_avg": torch.zeros(3)}, random_state())


def test_as_many_checkpoints_are_kept_as_asked(tmp_path):
    for step in (1, 2, 3, 10):
        save_checkpoint(tmp_path, checkpoint(step), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000010"]
    assert load_checkpoint(last_checkpoint(tmp_path)).weights["a"][0] == 10


def test_a_checkpoint_whose_writing_was_cut_off_is_not_seen(tmp_path):
    save_checkpoint(tmp_path, checkpoint(1), keep=1)
    (tmp_path / ".unfinished-step-00000002-1-x").mkdir()
    (tmp_path / "step-00000003").mkdir()  # without state.json
    assert last_checkpoint(tmp_path).name == "step-00000001"


def test_what_a_cut_off_deletion_left_behind_is_cleared(tmp_path):
    save_checkpoint(tmp_path, checkpoint(1), keep=1)
    (tmp_path / "step-00000001" / "state.json").unlink()  # killed in the middle of deleting it
    save_checkpoint(tmp_path, checkpoint(2), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_an_old_checkpoint_that_was_not_deleted_in_time_is_deleted_later(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path, checkpoint_every=2)
    with monkeypatch.context() as patch:
        crash_at(patch, "instruct", 3)
        with pytest.raises(StopHereError):
            train(recipe, tmp_path / "run", quiet=True)
    folder = tmp_path / "run" / "checkpoints" / "align"
    (last,) = folder.iterdir()
    save_checkpoint(folder, checkpoint(1), keep=9)
    train(recipe, tmp_path / "run", quiet=True)
    assert list(folder.iterdir()) == [last]


def test_a_damaged_checkpoint_says_what_to_do(tmp_path):
    path = save_checkpoint(tmp_path, checkpoint(1), keep=1)
    (path / "weights.safetensors").write_bytes(b"nothing")
    with pytest.raises(TrainingError, match="Delete this folder"):
        load_checkpoint(path)


def test_nothing_in_a_checkpoint_is_pickled(tmp_path):
    path = save_checkpoint(tmp_path, checkpoint(1), keep=1)
    names = sorted(file.name for file in path.iterdir())
    assert names == ["optimizer.safetensors", "random.safetensors", "state.json",
                     "weights.safetensors"]  # fmt: skip
    assert load_file(path / "weights.safetensors")
