"""The simulation of the packer's balance runs, and shows an even split."""

from benchmarks.rank_balance import simulate


def test_ranks_get_nearly_the_same_work():
    found = simulate(ranks=16, rows_per_rank=4, steps=1)
    assert len(found) == 1
    assert 1.0 <= found[0] < 1.05
