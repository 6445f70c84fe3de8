"""Rows are dealt out whole, as many to each as in turn, and more evenly."""

import random

from hypothesis import given
from hypothesis import strategies as st

from mmlm.data.dealing import deal


@given(st.lists(st.floats(0, 1e15), max_size=60), st.integers(1, 9))
def test_every_row_goes_to_one_rank_and_no_rank_has_more_than_in_turn(costs, world):
    dealt = deal(costs, world)
    assert sorted(row for rows in dealt for row in rows) == list(range(len(costs)))
    assert [len(rows) for rows in dealt] == [len(costs[rank::world]) for rank in range(world)]
    assert all(rows == sorted(rows) for rows in dealt)
    slowest = max(sum(costs[row] for row in rows) for rows in dealt)
    assert slowest <= max(sum(costs[rank::world]) for rank in range(world))


def test_rows_of_unlike_cost_are_dealt_evenly():
    draw = random.Random(0)
    costs = [draw.uniform(1.0, 2.0) for _ in range(256)]
    work = [sum(costs[row] for row in rows) for rows in deal(costs, 32)]
    in_turn = [sum(costs[rank::32]) for rank in range(32)]
    assert max(work) < 1.01 * sum(work) / 32 < max(in_turn)


def test_a_row_for_each_rank_is_dealt_in_turn():
    assert deal([5, 1, 9], 3) == [[0], [1], [2]]
    assert deal([5, 1], 3) == [[0], [1], []]
