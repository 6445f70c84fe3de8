"""The simulation of the packer's balance runs, and shows an even split."""

import pytest

from benchmarks.rank_balance import simulate


def test_ranks_get_nearly_the_same_work():
    found = simulate(ranks=16, rows_per_rank=4, steps=1)
    assert len(found) == 1
    assert 1.0 <= found[0] < 1.05


@pytest.mark.slow
def test_the_slowest_of_1024_ranks_is_at_most_three_percent_above_the_mean():
    assert max(simulate(ranks=1024, rows_per_rank=4, steps=2)) <= 1.03


def test_rows_that_are_filled_by_cost_are_even_with_one_row_a_rank():
    by_length = simulate(ranks=64, rows_per_rank=1, steps=1)
    by_cost = simulate(ranks=64, rows_per_rank=1, steps=1, by_cost=True)
    assert by_cost[0] < 1.03
    assert by_cost[0] < by_length[0]
