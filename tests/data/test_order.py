"""The order is a pure function of seed and position, in constant memory."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmlm.data import Mixture, Share, Source, open_mixture, read_mixture
from mmlm.data.order import key_of, permute
from mmlm.errors import ConfigError, DataError


class Rows(Source):
    def __init__(self, name, count):
        self.name, self._count = name, count

    def __len__(self):
        return self._count

    def sample(self, row):
        raise NotImplementedError

    def fingerprint(self):
        return str(self._count)


def places(mixture, count, start=0):
    return [mixture.place(position) for position in range(start, start + count)]


@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
def test_a_permutation_hits_every_index_once(size, key):
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


def test_the_order_of_a_seed_never_changes():
    # Runs are resumed by later versions: these values must stand for ever.
    assert permute(np.arange(8), 1000, key=42).tolist() == [270, 706, 590, 917, 806, 552, 785, 529]
    assert key_of("order", 0, 0) == 17177367427359739874


def test_neighbours_do_not_stay_neighbours():
    shuffled = permute(np.arange(10_000), 10_000, key=3)
    # Of 9,999 pairs about two are expected to stand one apart in any direction.
    assert (np.abs(np.diff(shuffled)) == 1).sum() < 12
    correlation = np.corrcoef(np.arange(10_000), shuffled)[0, 1]
    assert abs(correlation) < 0.04


def test_an_epoch_takes_every_row_as_often_as_its_weight_says():
    mixture = Mixture([(Rows("a", 10), Share(weight=2.0)), (Rows("b", 7), Share())], seed=1)
    assert mixture.epoch_rows == 27
    seen = places(mixture, 27)
    assert sorted(p.row for p in seen if p.source == 0) == sorted([*range(10), *range(10)])
    assert sorted(p.row for p in seen if p.source == 1) == list(range(7))


def test_a_fraction_takes_other_rows_each_epoch():
    mixture = Mixture([(Rows("a", 100), Share(weight=0.3))], seed=1)
    epochs = [{p.row for p in places(mixture, 30, start)} for start in (0, 30)]
    assert [len(rows) for rows in epochs] == [30, 30]
    assert epochs[0] != epochs[1]


def test_a_cap_bounds_a_large_source():
    mixture = Mixture([(Rows("a", 1000), Share(cap=10)), (Rows("b", 10), Share())])
    assert mixture.counts == {"a": 10, "b": 10}


def test_another_seed_gives_another_order_and_the_same_seed_the_same():
    def order(seed):
        return places(Mixture([(Rows("a", 50), Share())], seed=seed), 120)

    assert order(1) == order(1) != order(2)


def test_positions_can_be_asked_in_any_order():
    mixture = Mixture([(Rows("a", 9000), Share()), (Rows("b", 77), Share(weight=1.5))], seed=5)
    forward = places(mixture, 200, 8900)
    assert [mixture.place(p) for p in reversed(range(8900, 9100))] == forward[::-1]


def test_without_shuffling_rows_come_as_they_are_written():
    mixture = Mixture([(Rows("a", 3), Share()), (Rows("b", 2), Share())], shuffle=False)
    assert [(p.source, p.row) for p in places(mixture, 6)] == [
        (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (0, 0),
    ]  # fmt: skip


def test_a_million_rows_cost_no_memory_and_no_wait():
    mixture = Mixture([(Rows("a", 10**9), Share())], seed=0)
    assert len({p.row for p in places(mixture, 1000, 123_456_789)}) == 1000


def test_no_row_at_all_is_an_error():
    with pytest.raises(DataError, match="not one row"):
        Mixture([(Rows("empty", 0), Share())])


def test_a_mixture_is_read_from_names_files_and_lists(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "q", "answer": "a"}\n' * 4)
    (tmp_path / "mix.yaml").write_text(
        "mix:\n  - {use: jsonl, path: a.jsonl, weight: 2}\n  - {recipe: one, cap: 3}\n"
    )
    (tmp_path / "one.yaml").write_text(
        "about: {licence: CC0}\nuse: jsonl\npath: a.jsonl\nweight: 0.5\n"
    )

    def find(name):
        return tmp_path / f"{name}.yaml"

    mixture = open_mixture("mix", folder=tmp_path, find=find)
    assert mixture.counts == {"a": 8, "a-2": 2}
    assert open_mixture("a.jsonl", folder=tmp_path).epoch_rows == 4
    assert open_mixture(["a.jsonl", "a.jsonl"], folder=tmp_path).epoch_rows == 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"use": "jsonn", "path": "a"}, "Did you mean 'json"),
        ({"use": "jsonl"}, "path"),
        ({"use": "jsonl", "path": "a", "wieght": 2}, "wieght: no such key"),
        ({"use": "jsonl", "path": "a", "weight": 0}, "greater than 0"),
        (7, "must be the name"),
        ("nowhere", "nowhere"),
    ],
)
def test_wrong_words_for_data_are_named(words, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        read_mixture(words, folder=tmp_path)


def write_numbers(folder, **sizes):
    for name, size in sizes.items():
        rows = [{"question": name, "answer": str(n)} for n in range(size)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_a_temperature_gives_small_sources_a_larger_part_of_an_epoch(tmp_path):
    write_numbers(tmp_path, big=900, small=100)
    counts = {}
    for heat in (1, 2, 1000):
        words = {"mix": ["big.jsonl", "small.jsonl"], "temperature": heat}
        counts[heat] = list(open_mixture(words, folder=tmp_path).counts.values())
    assert counts[1] == [900, 100]
    assert counts[2] == [750, 250]  # 30 to 10, the roots of 900 and 100
    assert counts[1000] == [501, 499]
    words = {"mix": ["big.jsonl", {"recipe": "small.jsonl", "weight": 4}], "temperature": 2}
    assert list(open_mixture(words, folder=tmp_path).counts.values()) == [780, 520]
    words = {"mix": [{"recipe": "big.jsonl", "cap": 200}, "small.jsonl"], "temperature": 2}
    assert list(open_mixture(words, folder=tmp_path).counts.values()) == [200, 250]


def test_a_mix_with_a_temperature_stands_beside_other_sources(tmp_path):
    write_numbers(tmp_path, big=900, small=100, other=50)
    inner = {"mix": ["big.jsonl", "small.jsonl"], "temperature": 2}
    mixture = open_mixture([inner, "other.jsonl"], folder=tmp_path)
    assert list(mixture.counts.values()) == [750, 250, 50]
    with pytest.raises(ConfigError, match="Say it once"):
        open_mixture({"mix": [inner], "temperature": 3}, folder=tmp_path)
    with pytest.raises(ConfigError, match="temperature"):
        open_mixture({"mix": ["big.jsonl"], "temperature": 0}, folder=tmp_path)
