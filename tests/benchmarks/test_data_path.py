"""The benchmark of the data path runs, and both of its sides do the same work."""

import importlib.util
from argparse import Namespace
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).parents[2] / "benchmarks" / "data_path.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("benchmark_data_path", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_sides_make_the_same_pixels_and_ids_of_the_same_rows(bench, tmp_path):
    ours = bench.our_processor(tmp_path / "parts")
    names = bench.write_photos(tmp_path, 2)
    path = bench.write_rows(tmp_path, names, 6, name="rows.jsonl")
    steps = list(bench.our_steps(ours, path, 6, rows_per_step=1))
    samples = sorted((s for st in steps for r in st.rows for s in r.samples), key=lambda s: s.row)
    stock = bench.StockCollate(bench.stock_processor(ours), tmp_path)
    rows = [bench.json.loads(line) for line in path.read_text().splitlines()]
    batch = stock(rows)
    for index, sample in enumerate(samples):
        theirs = batch["input_ids"][index][batch["attention_mask"][index].bool()]
        assert sample.ids.tolist() == theirs.tolist()
        pixels = ours.image_processor.pixels(sample.images[0])[0]
        assert torch.equal(pixels, batch["pixel_values"][index])


def test_lengths_like_those_of_llava_665k_fill_their_rows(bench):
    found = bench.measure_fill(Namespace(tiny=True))
    assert found["occupancy"] >= 0.97
    assert found["occupancy"] > found["occupancy_of_padding"] + 0.2
