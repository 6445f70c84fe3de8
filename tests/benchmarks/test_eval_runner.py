"""The benchmark of the runner runs, and both of its sides say the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "benchmarks/eval_runner.py"


@pytest.mark.slow  # a process of its own
def test_both_sides_say_the_same_in_tiny(tmp_path):
    words = ["--tiny", "--questions", "12", "--threads", "1", "--json", str(tmp_path / "x.json")]
    subprocess.run([sys.executable, str(FILE), *words], check=True, timeout=600)
    figures = json.loads((tmp_path / "x.json").read_text())
    assert figures["questions"] == 12
    assert figures["share_of_equal_texts"] == 1.0
    assert figures["speed_ratio"] > 0
