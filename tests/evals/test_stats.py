"""Intervals, pass@k and paired comparisons against slow versions written another way."""

import itertools
import math
import random

import numpy as np
import pytest

from nanochat_jax.evals import stats


def slow_bootstrap(values, n, level, seed=1):
    rng = random.Random(seed)
    means = sorted(sum(rng.choices(values, k=len(values))) / len(values) for _ in range(n))
    edge = (1 - level) / 2
    return means[round(edge * (n - 1))], means[round((1 - edge) * (n - 1))]


@pytest.mark.parametrize(
    "values",
    [[1] * 30 + [0] * 70, [1] + [0] * 9, [i * i / 900 for i in range(30)], [0.0, 0.5, 0.5, 1.0, 1.0] * 8],
    ids=["binary", "few", "many distinct", "few distinct"],
)
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_bootstrap_equals_resampling_one_by_one(values, level):
    low, high = stats.bootstrap_interval(values, n=20_000, level=level)
    slow_low, slow_high = slow_bootstrap(values, 20_000, level)
    spread = np.std(values) / len(values) ** 0.5
    # a mean of few items moves in steps of one item: a quantile may fall on either side of a step
    tolerance = 0.06 * spread + (1.01 / len(values) if len(set(values)) < 10 else 0)
    assert abs(low - slow_low) <= tolerance and abs(high - slow_high) <= tolerance
    assert low < np.mean(values) < high


def test_bootstrap_is_deterministic_and_seeded():
    values = np.random.default_rng(0).random(50)
    assert stats.bootstrap_interval(values) == stats.bootstrap_interval(values.tolist())
    assert stats.bootstrap_interval(values) != stats.bootstrap_interval(values, seed=1)


@pytest.mark.parametrize("n", [1, 3, 1000])
def test_all_right_or_all_wrong_is_not_certainty(n):
    low, high = stats.bootstrap_interval([0] * n)
    assert low == 0 and high == pytest.approx(1.959964**2 / (n + 1.959964**2), rel=1e-6)
    low, high = stats.bootstrap_interval([1] * n)
    assert high == 1 and low == pytest.approx(n / (n + 1.959964**2), rel=1e-6)


def mean_centred(baselines):
    baselines = np.asarray(baselines)
    return lambda means: ((means - baselines) / (1 - baselines)).mean(-1)


def test_stratified_interval_against_a_loop_over_tasks():
    rng = random.Random(3)
    groups = [[int(rng.random() < p) for _ in range(m)] for p, m in [(0.4, 60), (0.8, 40), (0.1, 100)]]
    statistic = mean_centred([0.25, 0.25, 0.0])
    low, high = stats.stratified_interval(groups, statistic, n=10_000)
    figures = sorted(
        sum(
            (sum(rng.choices(g, k=len(g))) / len(g) - b) / (1 - b)
            for g, b in zip(groups, [0.25, 0.25, 0.0], strict=True)
        )
        / 3
        for _ in range(10_000)
    )
    assert low == pytest.approx(figures[250], abs=0.004) and high == pytest.approx(figures[9750], abs=0.004)


def test_stratified_interval_of_perfect_and_hopeless_tasks():
    low, high = stats.stratified_interval([[1] * 5, [1] * 8], mean_centred([0.25, 0.0]))
    assert high == 1.0 and 0.5 < low < 0.95
    low, high = stats.stratified_interval([[0] * 5], mean_centred([0.0]))
    assert low == 0.0 and 0.1 < high < 0.6
    with pytest.raises(ValueError, match="at least one"):
        stats.stratified_interval([], mean_centred([0.0]))


def test_pass_at_k_counts_subsets():
    for n, k in [(1, 1), (5, 1), (5, 3), (6, 6)]:
        for c in range(n + 1):
            drawn = list(itertools.combinations(range(n), k))
            some_right = sum(any(i < c for i in subset) for subset in drawn)
            assert stats.pass_at_k(n, c, k) == pytest.approx(some_right / len(drawn), abs=1e-12)


def test_pass_at_k_arrays_and_large_numbers():
    got = stats.pass_at_k(5000, np.array([0, 1, 2500, 5000]), 2000)
    assert got[0] == 0 and got[1] == pytest.approx(0.4) and got[2] == got[3] == 1
    for n, c, k in [(4, 2, 5), (4, 5, 1), (4, -1, 1), (4, 1, 0)]:
        with pytest.raises(ValueError, match="pass_at_k"):
            stats.pass_at_k(n, c, k)


def test_mcnemar_against_the_binomial_sum():
    for only_a, only_b in [(0, 0), (7, 2), (3, 25)]:
        a = [1] * only_a + [0] * only_b + [1, 0, 1]
        b = [0] * only_a + [1] * only_b + [1, 0, 1]
        flips = only_a + only_b
        tail = sum(math.comb(flips, i) for i in range(min(only_a, only_b) + 1)) / 2**flips
        difference, low, high, p = stats.paired_difference(a, b)
        assert p == pytest.approx(min(1.0, 2 * tail))
        assert difference == pytest.approx((only_a - only_b) / len(a)) and low <= difference <= high


def test_paired_interval_is_narrower_where_the_systems_agree():
    rng = np.random.default_rng(0)
    a = rng.random(300) < 0.5
    b = a.copy()
    b[:15] = ~b[:15]
    _, low, high, _ = stats.paired_difference(a, b)
    assert high - low < 0.06  # two independent samples of 300 would give 0.16


def test_paired_without_any_difference_or_with_nothing_else():
    difference, low, high, p = stats.paired_difference([1, 0, 1], [1, 0, 1])
    assert difference == 0 and -high == low < 0 and p == 1
    difference, low, high, p = stats.paired_difference([1] * 10, [0] * 10)
    assert difference == 1 and 0.6 < low < high == 1 and p == pytest.approx(2 / 1024)
    assert stats.paired_difference([0] * 10, [1] * 10)[:3] == (-1, -1, -low)


def test_paired_values_that_are_not_binary():
    rng = np.random.default_rng(1)
    base = rng.random(12)
    difference, low, high, p = stats.paired_difference(base + 0.02 * rng.normal(size=12) + 0.01, base)
    d = base + 0.02 * np.random.default_rng(9).normal(size=12) - base
    exact = np.mean([abs(np.dot(s, d)) >= abs(d.sum()) - 1e-12 for s in itertools.product([-1, 1], repeat=12)])
    assert stats.paired_difference(base + d, base)[3] == pytest.approx(exact, abs=0.02)
    assert low < difference < high and 0 < p <= 1
    with pytest.raises(ValueError, match="3 and 2"):
        stats.paired_difference([1, 0, 1], [1, 0])
    with pytest.raises(ValueError, match="NaN"):
        stats.bootstrap_interval([1.0, math.nan])
    with pytest.raises(ValueError, match="at least one"):
        stats.bootstrap_interval([])
    with pytest.raises(ValueError, match="3 of 2"):
        stats.wilson_interval(3, 2)
