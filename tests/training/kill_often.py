"""Runs one recipe unbroken, and once more killed again and again; a script, not a test.

    python -m tests.training.kill_often RECIPE.json FOLDER KILLS

Each run is a forked child, so that the imports are paid once. A child is killed with SIGKILL
a random while after it has logged some more steps: in a step, in a save, or between stages. The
moment hangs on its progress and not on a clock, so that a busy machine kills it too. Prints a
line for each child, and after a kill the stage of the last step that was logged.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mmlm.training import train


def in_child(work: Callable[[], Any], is_time: Callable[[], bool] | None = None) -> int:
    """Run `work` in a forked child and return its exit status; kill it when it is time."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
            os._exit(1)
        os._exit(0)
    while is_time is not None:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        if is_time():
            os.kill(child, signal.SIGKILL)
            break
        time.sleep(0.001)
    return os.waitpid(child, 0)[1]


def main(recipe_file: str, folder: str, kills: str) -> None:
    """Run, kill, go on."""
    torch.set_num_threads(1)
    recipe = json.loads(Path(recipe_file).read_text())
    place = Path(folder)

    def run(name: str) -> Callable[[], Any]:
        def work() -> None:
            os.environ["MMLM_CACHE"] = str(place / f"cache-{name}")
            train(recipe, place / name, quiet=True)

        return work

    def steps_told() -> int:
        log = place / "killed" / "log.jsonl"
        return log.read_bytes().count(b"\n") if log.exists() else 0

    def stage_told() -> str:
        whole = (place / "killed" / "log.jsonl").read_text().split("\n")[:-1]
        return json.loads(whole[-1])["stage"]

    status = in_child(run("unbroken"))
    print(f"unbroken {status}", flush=True)
    if status:
        sys.exit("The run that nobody kills failed.")
    draw = random.Random(0)
    for _ in range(int(kills)):
        if (place / "killed" / "result.json").exists():
            break
        goal = steps_told() + draw.randint(1, 3)

        def is_time(goal: int = goal) -> bool:
            if steps_told() < goal:
                return False
            time.sleep(draw.uniform(0, 0.03))
            return True

        status = in_child(run("killed"), is_time)
        print(f"killed {status}", flush=True)
        if status == signal.SIGKILL:
            print(f"in {stage_told()}", flush=True)
    print(f"finished {in_child(run('killed'))}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
