"""What belongs together is never parted."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlm.data.splits import clusters, deal
from mmlm.errors import DataError

KEYS = st.lists(st.lists(st.integers(0, 30), max_size=3), min_size=1, max_size=60)


@settings(max_examples=200, deadline=None)
@given(keys=KEYS)
def test_rows_that_share_a_key_are_in_one_cluster_and_every_row_is_in_one(keys):
    found = clusters(keys)
    assert sorted(row for cluster in found for row in cluster) == list(range(len(keys)))
    home = {row: index for index, cluster in enumerate(found) for row in cluster}
    for one in range(len(keys)):
        for other in range(one):
            if set(keys[one]) & set(keys[other]):
                assert home[one] == home[other]


@settings(max_examples=200, deadline=None)
@given(keys=KEYS, seed=st.integers(0, 3))
def test_no_cluster_is_parted_and_no_split_is_empty(keys, seed):
    groups = clusters(keys)
    if len(groups) < 3:
        with pytest.raises(DataError, match="fall into"):
            deal(groups, seed=seed)
        return
    splits = deal(groups, seed=seed)
    assert splits == deal(groups, seed=seed)
    assert sorted(row for rows in splits.values() for row in rows) == list(range(len(keys)))
    assert all(splits.values())
    for group in groups:
        assert sum(bool(set(group) & set(rows)) for rows in splits.values()) == 1


def test_the_shares_are_kept_and_the_seed_deals_anew():
    groups = [[2 * index, 2 * index + 1] for index in range(100)]
    splits = deal(groups)
    assert {name: len(rows) for name, rows in splits.items()} == {
        "train": 160, "validation": 20, "test": 20,
    }  # fmt: skip
    assert deal(groups, seed=1)["test"] != splits["test"]
