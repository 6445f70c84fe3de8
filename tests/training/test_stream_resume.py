"""A run over streams that is broken off goes on to the same bits, mixed or split among ranks."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.made import write_tars
from tests.training.launching import KILLED, group, launch
from tests.training.test_resume import assert_crashes_change_nothing, assert_same_bits
from tests.training.tiny_run import tiny_recipe, write_rows

ROOT = Path(__file__).parents[2]


def stream_recipe(folder, *, mixed=False, **run):
    """A recipe of two stages over shards, of which one is cut short."""
    write_rows(folder)
    if not (folder / "tars").exists():
        write_tars(folder / "tars", [9, 14, 5, 11])
        cut = folder / "tars" / "001.tar"
        cut.write_bytes(cut.read_bytes()[:9000])
    stream = {"use": "webdataset", "path": str(folder / "tars"), "window": 4, "shards_at_once": 2}
    words = [stream, {"use": "jsonl", "path": str(folder / "rows.jsonl")}] if mixed else [stream]
    recipe = tiny_recipe(folder, **run)
    for stage in recipe["stages"]:
        stage["data"] = words
        # No question stands beside a caption of a shard.
    for one in words:
        one["question"] = "What is it?"
    return recipe


def test_a_run_over_a_stream_that_crashed_ends_in_the_same_bits(tmp_path, monkeypatch):
    recipe = stream_recipe(tmp_path, mixed=True, checkpoint_every=2)
    assert_crashes_change_nothing(
        recipe, tmp_path, monkeypatch, (("align", 3), ("align", 6), ("instruct", 2))
    )


@pytest.mark.slow
def test_a_run_over_a_stream_that_is_killed_again_and_again_ends_in_the_same_bits(tmp_path):
    recipe = stream_recipe(tmp_path, checkpoint_every=1)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.kill_often", str(tmp_path / "recipe.json"),
         str(tmp_path), "4"],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "finished 0" in done.stdout.split("\n"), done.stdout
    assert f"killed {signal.SIGKILL}" in done.stdout.split("\n")
    assert_same_bits(tmp_path / "unbroken", tmp_path / "killed")


@pytest.mark.slow
def test_two_processes_that_split_a_stream_and_are_killed_end_in_the_same_bits(tmp_path):
    recipe = stream_recipe(tmp_path, mixed=True, row_tokens=100, checkpoint_every=2)
    kills = (["align", 3], 2, 4)  # at a step, and from outside after so many more lines of the log
    statuses = launch(
        group((recipe, tmp_path / "one", {}, None)),
        *(group((recipe, tmp_path / "two", {}, moment)) for moment in kills),
        group((recipe, tmp_path / "two", {}, None)),
    )
    assert statuses[1:-1] == [[KILLED] * 2, [-signal.SIGKILL] * 2, [-signal.SIGKILL] * 2]
    assert_same_bits(tmp_path / "one", tmp_path / "two")
    assert "cut_shard" in (tmp_path / "one" / "quarantine.jsonl").read_text()
