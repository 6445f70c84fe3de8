"""Rows are filled well, keep to both budgets, and can be gone on with."""

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmlm.data import Drop, Packer, PackingConfig, Quarantine
from mmlm.errors import DataError


class Sized(NamedTuple):
    position: int
    num_tokens: int
    num_tiles: int = 1


def pack(config, samples):
    packer = Packer(config)
    rows = [row for sample in samples for row in packer.add(sample)]
    return rows + packer.flush()


LENGTHS = st.lists(st.tuples(st.integers(1, 64), st.integers(0, 4)), max_size=200)


@given(LENGTHS, st.integers(1, 40))
def test_every_sample_is_in_one_row_and_both_budgets_hold(sizes, pool):
    config = PackingConfig(row_tokens=64, pool_samples=pool, max_tiles=8)
    samples = [Sized(i, tokens, tiles) for i, (tokens, tiles) in enumerate(sizes)]
    rows = pack(config, samples)
    assert sorted(s.position for row in rows for s in row.samples) == list(range(len(samples)))
    assert all(sum(s.num_tokens for s in row.samples) == row.num_tokens <= 64 for row in rows)
    assert all(sum(s.num_tiles for s in row.samples) == row.num_tiles <= 8 for row in rows)


@given(LENGTHS, st.integers(0, 200))
def test_a_packer_goes_on_from_its_state(sizes, cut):
    config = PackingConfig(row_tokens=64, pool_samples=9, max_tiles=8)
    samples = [Sized(i, tokens, tiles) for i, (tokens, tiles) in enumerate(sizes)]
    whole = [[s.position for s in row.samples] for row in pack(config, samples)]
    first = Packer(config)
    rows = [row for sample in samples[:cut] for row in first.add(sample)]
    second = Packer(config)
    second.restore([samples[position] for position in first.state()])
    rows += [row for sample in samples[cut:] for row in second.add(sample)] + second.flush()
    assert [[s.position for s in row.samples] for row in rows] == whole


def test_rows_of_llava_like_lengths_are_at_least_97_percent_full():
    draw = np.random.default_rng(0)
    texts = np.exp(draw.normal(np.log(250), 0.9, 5000)).astype(int)
    samples = [Sized(i, int(min(4096, 576 + text))) for i, text in enumerate(texts)]
    rows = pack(PackingConfig(row_tokens=4096), samples)
    assert sum(row.num_tokens for row in rows) / (4096 * len(rows)) > 0.97


def test_the_oldest_sample_goes_first():
    packer = Packer(PackingConfig(row_tokens=64, pool_samples=5))
    packer.add(Sized(0, 33))
    closed = [row for i in range(1, 5) for row in packer.add(Sized(i, 60))]
    assert [[s.position for s in row.samples] for row in closed] == [[0]]


def drops(count, cause="no_image_file"):
    return [Drop("photos", i, str(i), cause, f"{i}.png") for i in range(count)]


def test_drops_are_written_down_and_counted_by_cause(tmp_path):
    quarantine = Quarantine(tmp_path / "q.jsonl")
    quarantine.record([*drops(2), *drops(1, "too_long")], seen=100)
    assert len((tmp_path / "q.jsonl").read_text().splitlines()) == 3
    assert "2  photos: no_image_file" in quarantine.table()


def test_a_spent_budget_stops_the_run_and_says_why(tmp_path):
    quarantine = Quarantine(tmp_path / "q.jsonl", budget=0.1)
    quarantine.record(drops(10), seen=100, expected=100)
    with pytest.raises(DataError, match=r"no_image_file \(the image file does not exist\)"):
        quarantine.record(drops(1), seen=1, expected=100)


def test_a_resumed_run_counts_no_drop_twice(tmp_path):
    path = tmp_path / "q.jsonl"
    quarantine = Quarantine(path)
    quarantine.record(drops(2), seen=50)
    state = quarantine.state()
    quarantine.record(drops(3), seen=50)
    again = Quarantine(path)
    again.restore(state)
    assert again.dropped == 2
    assert len(path.read_text().splitlines()) == 2


class Ragged(NamedTuple):
    """A sample of an encoder that takes pictures at their own size."""

    position: int
    num_tokens: int
    num_tiles: int
    num_patches: int


@given(st.lists(st.tuples(st.integers(1, 64), st.integers(0, 300)), min_size=1, max_size=60),
       st.booleans())  # fmt: skip
def test_rows_keep_the_budget_of_patches_too_and_lose_nothing(sizes, alike):
    packer = Packer(PackingConfig(row_tokens=64, pool_samples=8, max_patches=300, alike=alike))
    samples = [Ragged(n, tokens, int(p > 0), p) for n, (tokens, p) in enumerate(sizes)]
    rows = [row for sample in samples for row in packer.add(sample)] + packer.flush()
    assert sorted(s.position for row in rows for s in row.samples) == list(range(len(samples)))
    assert all(row.num_patches <= 300 for row in rows)
    assert all(row.num_tokens <= 64 for row in rows)
