"""Intervals hold the truth as often as they say, and the tests find what they should."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from mmlm.errors import EvaluationError
from mmlm.evaluation.statistics import (
    bootstrap,
    cluster_sums,
    mean_of_shares,
    paired_metric_test,
    paired_test,
    share_interval,
    smallest_visible_difference,
    wilson,
)


@pytest.mark.parametrize(("right", "n"), [(0, 10), (3, 10), (50, 100), (997, 1000), (1000, 1000)])
def test_wilson_equals_scipy(right, n):
    ours = wilson(right, n)
    theirs = stats.binomtest(right, n).proportion_ci(method="wilson")
    assert ours.low == pytest.approx(theirs.low, abs=1e-12)
    assert ours.high == pytest.approx(theirs.high, abs=1e-12)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_intervals_of_independent_questions_cover_the_truth(share):
    random = np.random.default_rng(0)
    runs, n = 600, 200
    hits = 0
    for _ in range(runs):
        scores = (random.random(n) < share).astype(float)
        low, high = share_interval(scores, range(n))[1:]
        hits += low <= share <= high
    # 95 % of 600 is 570; three standard deviations are 16.
    assert 570 - 16 <= hits <= 570 + 16


def test_intervals_of_clustered_questions_cover_the_truth():
    """Five questions on a picture that are nearly all right or all wrong together."""
    random = np.random.default_rng(1)
    runs, pictures, each, share = 200, 120, 5, 0.6
    hits = naive = 0
    for seed in range(runs):
        easy = random.random(pictures) < share
        same = random.random((pictures, each)) < 0.9
        other = random.random((pictures, each)) < share
        scores = np.where(same, easy[:, None], other).astype(float).ravel()
        clusters = np.repeat(np.arange(pictures), each).tolist()
        low, high = share_interval(scores, clusters, seed=seed)[1:]
        hits += low <= share <= high
        low, high = wilson(scores.sum(), len(scores))[1:]
        naive += low <= share <= high
    # 95 % of 200 is 190; three standard deviations are 9.
    assert 181 <= hits <= 199
    assert naive < 165, "without clusters the interval would be far too short"


def test_intervals_of_a_metric_that_is_no_mean_cover_the_truth():
    """F1 over pictures with four questions each; hits, said and true are drawn together."""
    random = np.random.default_rng(3)
    hits = 0
    for seed in range(200):
        true = random.random((150, 4)) < 0.5
        said = random.random((150, 4)) < np.where(true, 0.7, 0.3)
        tallies = np.stack([(true & said).sum(1), said.sum(1), true.sum(1)], axis=1).astype(float)
        low, high = bootstrap(tallies, f1, seed=seed, draws=400)[1:]
        hits += low <= 0.7 <= high  # 2 · 0.35 / (0.5 + 0.5)
    # 95 % of 200 is 190; three standard deviations are 9.
    assert 181 <= hits <= 199


def f1(totals):
    return 2 * totals[..., 0] / (totals[..., 1] + totals[..., 2])


def test_intervals_of_a_difference_cover_the_truth():
    """Two passes over 60 pictures with three questions each, of which half are easy for one."""
    random = np.random.default_rng(4)
    clusters = np.repeat(np.arange(60), 3).tolist()
    hits = 0
    for seed in range(150):
        easy = np.repeat(random.random(60) < 0.5, 3)
        first = (random.random(180) < np.where(easy, 0.9, 0.5)).astype(float)
        second = (random.random(180) < 0.5).astype(float)
        found = paired_test(first, second, clusters, seed=seed, draws=50)
        hits += found.low <= 0.2 <= found.high
    # 95 % of 150 is 142.5; three standard deviations are 8.
    assert 134 <= hits <= 150


def test_the_bootstrap_is_a_function_of_its_seed():
    sums, _ = cluster_sums([0.0, 1.0, 1.0, 0.5], ["a", "a", "b", "c"])
    assert bootstrap(sums, seed=3) == bootstrap(sums, seed=3)


def test_the_bootstrap_of_a_ratio_equals_the_loop():
    random = np.random.default_rng(0)
    tallies = np.column_stack([random.integers(0, 5, 30), random.integers(1, 6, 30)]).astype(float)
    ours = bootstrap(tallies, mean_of_shares, seed=0, draws=4000)

    looped = []
    for _ in range(4000):
        drawn = tallies[random.integers(0, 30, 30)]
        looped.append(drawn[:, 0].sum() / drawn[:, 1].sum())
    # Two runs of 4,000 draws differ in a quantile by about 0.01 here; worst seen 0.012.
    assert ours.low == pytest.approx(np.quantile(looped, 0.025), abs=0.03)
    assert ours.high == pytest.approx(np.quantile(looped, 0.975), abs=0.03)


class TestPairedTest:
    def test_finds_a_real_difference(self):
        random = np.random.default_rng(0)
        first = (random.random(400) < 0.8).astype(float)
        second = (random.random(400) < 0.6).astype(float)
        result = paired_test(first, second, range(400))
        assert result.p_value < 0.001
        assert result.low > 0

    def test_is_not_fooled_by_many_questions_about_few_pictures(self):
        first = np.ones(300)
        second = np.concatenate([np.zeros(150), np.ones(150)])
        clusters = np.repeat([0, 1, 2, 3], 75).tolist()
        assert paired_test(first, second, clusters).p_value > 0.2
        assert paired_test(first, second, range(300)).p_value < 0.001

    def test_cries_wolf_as_rarely_as_it_says(self):
        random = np.random.default_rng(2)
        alarms = 0
        for _ in range(150):
            first, second = (random.random((2, 80)) < 0.5).astype(float)
            alarms += paired_test(first, second, range(80), draws=400).p_value < 0.05
        # 5 % of 300 is 15; three standard deviations are 11.
        assert alarms <= 26

    def test_equal_answers_differ_by_nothing(self):
        assert paired_test([1, 0, 1], [1, 0, 1], "abc") == (0.0, 0.0, 0.0, 1.0)

    def test_refuses_other_items(self):
        with pytest.raises(EvaluationError, match="the same items"):
            paired_test([1, 0], [1], "ab")


def test_the_smallest_visible_difference_is_seen_four_times_out_of_five():
    n, share = 400, 0.5
    gap = smallest_visible_difference(n, share)
    random = np.random.default_rng(0)
    first = random.binomial(n, share + gap / 2, 4000) / n
    second = random.binomial(n, share - gap / 2, 4000) / n
    spread = np.sqrt(first * (1 - first) / n + second * (1 - second) / n)
    power = np.mean((first - second) / spread > 1.96)
    assert power == pytest.approx(0.8, abs=0.03)


def test_no_items_is_an_error():
    calls = (lambda: wilson(0, 0), lambda: smallest_visible_difference(0), lambda: bootstrap([]))
    for call in calls:
        with pytest.raises(EvaluationError):
            call()


class TestAMetricThatIsNoMean:
    def test_gives_the_sign_flip_where_it_is_one(self):
        draw = np.random.default_rng(0)
        first, second = (draw.random(60) < share for share in (0.8, 0.5))
        ones = np.ones(60)
        both = [np.stack([side.astype(float), ones], axis=1) for side in (first, second)]
        plain = paired_test(first, second, range(60), seed=1)
        metric = paired_metric_test(both[0], both[1], mean_of_shares, seed=1)
        assert metric.difference == pytest.approx(plain.difference)
        # Both p-values are drawn: 2,000 and 4,000 draws of the same distribution.
        assert metric.p_value == pytest.approx(plain.p_value, abs=0.01)
        assert metric.low == pytest.approx(plain.low, abs=0.03)

    def test_equal_passes_do_not_differ(self):
        tallies = np.ones((9, 2))
        assert paired_metric_test(tallies, tallies, mean_of_shares).p_value == 1.0
