"""Starts the processes of one machine: what `mmlm train --processes N` does without a launcher.

Each process gets the five variables that torchrun would set. The first one shows itself; what the
others say is kept, and shown if one of them fails alone. Ctrl-C and SIGTERM reach all of them
once, so that they save after the step; torchrun passes a signal on a second time, which stops at
once. For several machines there is torchrun. Nothing here imports torch.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

_SECONDS_TO_END, _SECONDS_BETWEEN_LOOKS, _LINES_SHOWN = 15.0, 0.1, 30


def is_launched() -> bool:
    """Whether a launcher has started this process."""
    return "RANK" in os.environ


def launch(command: Sequence[str], processes: int) -> int:
    """Run a command in several processes that know of one another; wait for all.

    Args:
        command: What each process runs.
        processes: How many.

    Returns:
        The exit status: of the first process, or of one that failed where the first did not.
    """
    environment = {
        **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
    }  # fmt: skip
    cores = os.cpu_count() or 1
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    with tempfile.TemporaryDirectory(prefix="mmlm-ranks-") as folder:
        running: list[subprocess.Popen[bytes]] = []
        for rank in range(processes):
            own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            if rank == 0:
                running.append(subprocess.Popen(command, env=own))
                continue
            with (Path(folder) / str(rank)).open("wb") as told:
                running.append(subprocess.Popen(command, env=own, stdout=told, stderr=told))
        statuses = _wait(running)
        wrong = next((rank for rank, status in enumerate(statuses) if status), None)
        if wrong:
            lines = (Path(folder) / str(wrong)).read_text(errors="replace").splitlines()
            print(f"process {wrong} of {processes} failed:", file=sys.stderr)
            print("\n".join(lines[-_LINES_SHOWN:]), file=sys.stderr)
    status = 0 if wrong is None else statuses[wrong]
    return status if status >= 0 else 128 - status


def _wait(running: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Wait for all; where one has failed, the others wait for it in vain and are ended.

    Returns:
        The exit statuses; 0 for those that were ended here.
    """

    def pass_on(number: int, frame: FrameType | None) -> None:
        del frame
        # The terminal sends Ctrl-C to all processes itself.
        if number != signal.SIGINT:
            for process in running:
                process.send_signal(number)

    before = {one: signal.signal(one, pass_on) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        while all(process.poll() in (None, 0) for process in running):
            if all(process.returncode == 0 for process in running):
                return [0] * len(running)
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        last = time.monotonic() + _SECONDS_TO_END
        while time.monotonic() < last and any(process.poll() is None for process in running):
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        left = [process.poll() is None for process in running]
        for process in running:
            process.kill()
            process.wait()
        return [0 if ended else p.returncode for p, ended in zip(running, left, strict=True)]
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
