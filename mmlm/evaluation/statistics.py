"""How sure a score is: intervals, paired tests, and what a benchmark of a size can show.

Several questions about one picture are not independent, so everything here works on
clusters: a cluster is the set of items that share a picture. A metric is a function of
sums over clusters (its tallies), which makes the bootstrap one matrix product, for a plain
mean as for F1. Nothing here knows an item, a scorer or a model.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from math import sqrt
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmlm.errors import EvaluationError

Floats = NDArray[np.float64]
Value = Callable[[Floats], Floats]
"""From tallies ``(..., k)`` to the metric ``(...)``."""

DRAWS = 2000
_BLOCK_DRAWS = 100


class Interval(NamedTuple):
    """A score and the ends of its interval, in the unit of the score."""

    score: float
    low: float
    high: float


class PairedResult(NamedTuple):
    """The mean of paired differences, its interval, and how likely chance makes one as large."""

    difference: float
    low: float
    high: float
    p_value: float


def wilson(right: float, n: int, *, confidence: float = 0.95) -> Interval:
    """Wilson's interval of a share; it stays honest where nothing, or everything, is right.

    >>> wilson(0, 20)
    Interval(score=0.0, low=0.0, high=0.161...)
    >>> wilson(50, 100)
    Interval(score=0.5, low=0.403..., high=0.596...)
    """
    if n <= 0:
        raise EvaluationError(f"An interval needs at least one item (got n = {n}).")
    z = _quantile(confidence)
    share = right / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low = 0.0 if right == 0 else centre - half
    high = 1.0 if right == n else centre + half
    return Interval(share, low, high)


def mean_of_shares(totals: Floats) -> Floats:
    """The metric of most benchmarks: tallies are ``(sum of scores, number of items)``."""
    return totals[..., 0] / np.maximum(totals[..., 1], 1e-12)


def cluster_sums(
    values: Sequence[float] | Floats, clusters: Sequence[Hashable]
) -> tuple[Floats, NDArray[np.int64]]:
    """Add up values by cluster.

    Returns:
        ``(clusters, 2)``: the sum and the number of items of each cluster, in the order of
        first appearance; and the cluster number of each value.
    """
    if len(values) != len(clusters):
        raise EvaluationError(f"{len(values)} values came with {len(clusters)} cluster names.")
    numbers: dict[Hashable, int] = {}
    index = np.array([numbers.setdefault(name, len(numbers)) for name in clusters], dtype=np.int64)
    sums = np.zeros((len(numbers), 2))
    np.add.at(sums[:, 0], index, np.asarray(values, dtype=np.float64))
    np.add.at(sums[:, 1], index, 1.0)
    return sums, index


def bootstrap(
    tallies: Floats,
    value: Value = mean_of_shares,
    *,
    seed: int = 0,
    draws: int = DRAWS,
    confidence: float = 0.95,
) -> Interval:
    """Percentile bootstrap of a metric: whole clusters are drawn, with replacement.

    Args:
        tallies: ``(clusters, k)``, what each cluster adds to the sums behind the metric.
        value: The metric, from sums ``(..., k)`` to numbers ``(...)``.
        seed: Seed of the draws; the interval is a pure function of the arguments.
        draws: Number of draws.
        confidence: Share of intervals that hold the truth.
    """
    tallies = np.asarray(tallies, dtype=np.float64)
    if tallies.ndim != 2 or not len(tallies):
        raise EvaluationError(f"The bootstrap needs at least one cluster (got {tallies.shape}).")
    random = np.random.default_rng(seed)
    count = len(tallies)
    found: list[Floats] = []
    # In blocks, because (draws, clusters) of a large benchmark would not fit into memory.
    for start in range(0, draws, _BLOCK_DRAWS):
        weights = random.multinomial(
            count, np.full(count, 1 / count), size=min(_BLOCK_DRAWS, draws - start)
        )
        found.append(value(weights @ tallies))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(found), [tail, 1 - tail])
    return Interval(float(value(tallies.sum(axis=0))), float(low), float(high))


def share_interval(
    scores: Sequence[float] | Floats,
    clusters: Sequence[Hashable],
    *,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """The interval of a mean score between 0 and 1.

    Wilson where every picture has one question with a right or wrong answer, and where the
    share is 0 or 1, because no draw of a bootstrap ever leaves those; there n is the number
    of pictures, the cautious choice. Bootstrap over pictures everywhere else.
    """
    values = np.asarray(scores, dtype=np.float64)
    sums, _ = cluster_sums(values, clusters)
    share = float(values.mean())
    if share in (0.0, 1.0):
        return wilson(share * len(sums), len(sums), confidence=confidence)
    if len(sums) == len(values) and bool(np.isin(values, (0.0, 1.0)).all()):
        return wilson(float(values.sum()), len(values), confidence=confidence)
    return bootstrap(sums, seed=seed, confidence=confidence)


def paired_test(
    first: Sequence[float] | Floats,
    second: Sequence[float] | Floats,
    clusters: Sequence[Hashable],
    *,
    seed: int = 0,
    draws: int = 4000,
    confidence: float = 0.95,
) -> PairedResult:
    """Compare two passes over the same items: `first` minus `second`.

    The unit is the picture: the differences of all its items change sign together in the
    permutation test, and are drawn together in the bootstrap of the interval.

    Args:
        first: A score for each item.
        second: A score for each of the same items, in the same order.
        clusters: The picture of each item.
        seed: Seed of both.
        draws: Number of sign flips.
        confidence: Share of intervals that hold the truth.
    """
    if len(first) != len(second):
        raise EvaluationError(
            f"A paired test compares the same items, but one pass has {len(first)} and the other "
            f"{len(second)}. Compare only the items that both answered."
        )
    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    sums, _ = cluster_sums(differences, clusters)
    interval = bootstrap(sums, seed=seed, confidence=confidence)
    moved = sums[sums[:, 0] != 0, 0]
    if not len(moved):
        return PairedResult(0.0, interval.low, interval.high, 1.0)
    random = np.random.default_rng(seed)
    seen = abs(moved.sum())
    as_large = 0
    for start in range(0, draws, _BLOCK_DRAWS):
        signs = random.choice((-1.0, 1.0), size=(min(_BLOCK_DRAWS, draws - start), len(moved)))
        as_large += int((np.abs(signs @ moved) >= seen - 1e-9).sum())
    return PairedResult(*interval, p_value=(as_large + 1) / (draws + 1))


def paired_metric_test(
    first: Floats,
    second: Floats,
    value: Value,
    *,
    seed: int = 0,
    draws: int = DRAWS,
    confidence: float = 0.95,
) -> PairedResult:
    """Compare two passes by a metric that is no mean, such as F1, CIDEr or MME's points.

    Pictures are drawn together for the interval. For the p-value, the two passes change places
    in whole pictures; where the metric is a mean, this is the sign-flip of `paired_test`.

    Args:
        first: ``(clusters, k)``, the tallies of the first pass.
        second: ``(clusters, k)``, those of the second, of the same clusters in the same order.
        value: The metric, from sums ``(..., k)`` to numbers ``(...)``.
        seed: Seed of both.
        draws: Number of draws, and of exchanges.
        confidence: Share of intervals that hold the truth.
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 2 or not len(first):
        raise EvaluationError(
            f"A paired test compares the same pictures, but the tallies have the shapes "
            f"{first.shape} and {second.shape}."
        )
    random, count = np.random.default_rng(seed), len(first)
    totals = first.sum(axis=0), second.sum(axis=0)
    seen = float(value(totals[0]) - value(totals[1]))
    drawn: list[Floats] = []
    as_large = 0
    for start in range(0, draws, _BLOCK_DRAWS):
        size = min(_BLOCK_DRAWS, draws - start)
        weights = random.multinomial(count, np.full(count, 1 / count), size=size)
        drawn.append(value(weights @ first) - value(weights @ second))
        moved = random.integers(0, 2, size=(size, count)).astype(np.float64) @ (second - first)
        swapped = value(totals[0] + moved) - value(totals[1] - moved)
        as_large += int((np.abs(swapped) >= abs(seen) - 1e-9).sum())
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(drawn), [tail, 1 - tail])
    return PairedResult(seen, float(low), float(high), (as_large + 1) / (draws + 1))


def visible_by_interval(interval: Interval, *, power: float = 0.8) -> float:
    """Return the smallest difference that two runs show, from the width of one's interval.

    For metrics that are no share of right answers; the two are taken as measured on different
    items, which is the cautious case.

    >>> round(visible_by_interval(Interval(0.5, 0.469, 0.531)), 3)
    0.063
    """
    spread = (interval.high - interval.low) / (2 * _quantile(0.95))
    return (_quantile(0.95) + NormalDist().inv_cdf(power)) * sqrt(2) * spread


def smallest_visible_difference(n: int, share: float = 0.5, *, power: float = 0.8) -> float:
    """The smallest difference between two models that n items show, unpaired, 4 times out of 5.

    >>> round(smallest_visible_difference(1000), 3)
    0.063
    """
    if n <= 0:
        raise EvaluationError(f"The power of a benchmark needs at least one item (got n = {n}).")
    share = min(max(share, 0.5 / n), 1 - 0.5 / n)
    z = _quantile(0.95) + NormalDist().inv_cdf(power)
    return min(1.0, z * sqrt(2 * share * (1 - share) / n))


def _quantile(confidence: float) -> float:
    return NormalDist().inv_cdf(0.5 + confidence / 2)
