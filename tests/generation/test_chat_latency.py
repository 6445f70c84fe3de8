"""The benchmark of follow-ups runs, and both of its sides say the same."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

FILE = Path(__file__).parents[2] / "benchmarks/chat_latency.py"


def test_the_benchmark_times_a_follow_up_of_twenty_tokens_behind_three_pictures(
    tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(FILE.parent)
    spec = importlib.util.spec_from_file_location("chat_latency", FILE)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    options = argparse.Namespace(tiny=True, dtype="float32")
    assistant, weights = benchmark.build(options, tmp_path)
    figures = benchmark.compare(assistant, 2)
    assert weights == "random"
    assert figures["image_tokens"] == 3 * 196
    # The question, and what the template writes around it in bytes.
    assert 20 <= figures["prompt_tokens"] - figures["kept_tokens"] <= 70
    assert 300 <= figures["prompt_tokens"] - figures["image_tokens"] <= 420
    assert figures["same_first_token"] == 2
    assert figures["ratio"] > 1
