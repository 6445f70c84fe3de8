"""The benchmark of encoders runs, and both of its sides give the same features."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "benchmarks/encode.py"


def test_the_benchmark_compares_the_same_features(tmp_path, capsys):
    pytest.importorskip("timm")
    spec = importlib.util.spec_from_file_location("encode", FILE)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    out = tmp_path / "figures.json"
    benchmark.main(["--tiny", "--rounds", "1", "--threads", "1", "--json", str(out)])
    figures = json.loads(out.read_text())
    assert set(figures["overhead"]) == set(benchmark.encoders_to_compare(True))
    for found in figures["overhead"].values():
        assert found["largest_difference"] == 0.0
        assert found["ratio"] > 0
    # Padded rows add up in another order.
    assert figures["ragged"]["largest_difference"] < 1e-4
    assert 0 < figures["ragged"]["padding_share"] < 1
    assert "mixed sizes" in capsys.readouterr().out
