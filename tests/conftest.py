"""What every test gets: one thread, no network unless asked for, skips that say why."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

ROOT = Path(__file__).parents[1]

collect_ignore = ["plugin"]
"""A package from outside: only the test of plug-ins may import it."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this machine cannot run."""
    for item in items:
        if item.get_closest_marker("gpu") and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; there is none here"))
        if item.get_closest_marker("hub") and not _reaches_hub():
            item.add_marker(pytest.mark.skip(reason="needs the Hugging Face Hub; not reached"))


@cache
def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@cache
def _reaches_hub() -> bool:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=5).close()
    except (urllib.error.URLError, OSError):
        return False
    return True


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., str]:
    """Return a function that runs code in a fresh Python process and returns what it printed."""

    def run(code: str, *, isolated: bool = False) -> str:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        if not isolated:
            environment["PYTHONPATH"] = str(ROOT)
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run
