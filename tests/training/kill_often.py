"""Runs one recipe unbroken, and once more killed again and again; a script, not a test.

    python -m tests.training.kill_often RECIPE.json FOLDER KILLS

Each run is a forked child, so that the imports are paid once. A child is killed with SIGKILL
at a random moment: in a step, in a save, or between stages. Prints a line for each child.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mmlm.training import train


def in_child(work: Callable[[], Any], kill_after_seconds: float | None = None) -> int:
    """Run `work` in a forked child and return its exit status; kill it after a while."""
    child = os.fork()
    if child == 0:
        if kill_after_seconds is not None:
            timer = threading.Timer(
                kill_after_seconds, lambda: os.kill(os.getpid(), signal.SIGKILL)
            )
            timer.daemon = True
            timer.start()
        try:
            work()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
            os._exit(1)
        os._exit(0)
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

    begun = time.monotonic()
    status = in_child(run("unbroken"))
    seconds = time.monotonic() - begun
    print(f"unbroken {status}", flush=True)
    draw = random.Random(0)
    for _ in range(int(kills)):
        if (place / "killed" / "result.json").exists():
            break
        status = in_child(run("killed"), kill_after_seconds=draw.uniform(0.3, 0.9) * seconds)
        print(f"killed {status}", flush=True)
    print(f"finished {in_child(run('killed'))}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
