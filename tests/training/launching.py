"""Runs trainings in several processes, as a launcher would start them; a helper of tests.

    python -m tests.training.launching  < [[group, ...]]

A group is {world, jobs, log}; a job is [recipe, out, overrides, dies_at]. The processes are forked
from one that has imported everything, because imports take longer than the trainings. With
`dies_at`, a stage and a step, all processes of the group end there as if they were killed; with a
number, they are killed from outside once so many more lines were logged. Beside
each run, `OUT-pictures-RANK` tells how many pictures each row of a rank had, a line for each step.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]
KILLED = 9


def group(*jobs, world=2):
    """Return jobs that run one after another in the same processes."""
    return {"world": world, "jobs": [[r, str(out), words, dies] for r, out, words, dies in jobs]}


def launch(*groups, most_seconds=1200):
    """Run groups of jobs; return the exit status of every process of each.

    After `most_seconds` all of them are killed: a rank may be waiting for ever.
    """
    with tempfile.TemporaryDirectory() as logs:
        for number, one in enumerate(groups):
            one["log"] = f"{logs}/{number}"
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.training.launching"], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                 "ACCELERATE_USE_CPU": "1", "DS_ACCELERATOR": "cpu"},
        )  # fmt: skip
        try:
            told, wrong = process.communicate(json.dumps(groups), timeout=most_seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        assert process.returncode == 0, wrong
        statuses = json.loads(told.splitlines()[-1])
        told = "\n".join(path.read_text()[-3000:] for path in sorted(Path(logs).iterdir()))
    fine = (0, KILLED, -signal.SIGKILL)
    assert all(code in fine for found in statuses for code in found), told
    return statuses


def _rank(one, rank, port):
    world = str(one["world"])
    if one["world"] > 1:
        os.environ |= {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "RANK": str(rank),
                       "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": port}  # fmt: skip
    log = os.open(f"{one['log']}-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from mmlm.training import train
    from mmlm.training.stage import StageRun

    learn, dies = StageRun._learn, []

    def learn_or_die(self, batch, factor):
        counts = [sum(len(one.images) for one in row.samples) for row in batch.rows]
        with Path(f"{self.run.out}-pictures-{rank}").open("a") as file:
            file.write(f"{counts}\n")
        if [self.stage.name, self.step] == dies[-1]:
            os._exit(KILLED)
        return learn(self, batch, factor)

    StageRun._learn = learn_or_die
    for recipe, out, overrides, dies_at in one["jobs"]:
        dies.append(dies_at)
        train(recipe, out, overrides=overrides, quiet=True)


def _run(one):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    children = []
    for rank in range(one["world"]):
        child = os.fork()
        if child == 0:
            try:
                _rank(one, rank, port)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    _, out, _, dies_at = one["jobs"][0]
    if isinstance(dies_at, int):
        _kill_after(children, Path(out) / "log.jsonl", dies_at)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _kill_after(children, log, lines):
    """Kill all children a random while after so many more lines, wherever they are then."""

    def told():
        return log.read_bytes().count(b"\n") if log.exists() else 0

    goal = told() + lines
    while told() < goal and all(_runs(child) for child in children):
        time.sleep(0.001)
    time.sleep(random.Random(goal).uniform(0, 0.1))
    for child in children:
        os.kill(child, signal.SIGKILL)


def _runs(child):
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def main():
    """Import once, then fork."""
    import torch

    torch.set_num_threads(1)
    import mmlm.training.sharding
    import mmlm.training.trainer  # noqa: F401

    if importlib.util.find_spec("deepspeed") is not None:
        # A faster way to talk within one machine that would have to be compiled first.
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    print(json.dumps([_run(one) for one in json.load(sys.stdin)]))


if __name__ == "__main__":
    main()
