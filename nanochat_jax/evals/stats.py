"""How sure an evaluation is of its numbers: intervals, pass@k and paired comparisons. Deterministic.

An interval is the percentile bootstrap over items (Efron 1979): the items are drawn again with replacement, and the
interval holds the middle `level` of the means. Where all items are right, or all are wrong, resampling cannot vary and
would claim certainty; there it is Wilson's score interval (1927) instead.

Wilson's interval and McNemar's test are SciPy's. Resampling is done here: `scipy.stats.bootstrap` draws every item of
every resample, where the counts of right and wrong ones suffice.
"""

from collections.abc import Callable, Sequence

import numpy as np

# Numbers drawn at a time: keeps resampling of 14,000 items within some ten megabytes.
_BLOCK = 1 << 20


def wilson_interval(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a rate: successes of n trials. Never of zero width, never outside 0..1."""
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"wilson_interval needs 0 <= successes <= n and n >= 1, got {successes} of {n}")
    from scipy.stats import binomtest  # half a second, which commands that need no interval are spared

    low, high = binomtest(successes, n).proportion_ci(level, method="wilson")
    # At the ends the formula is exactly 0 or 1; rounding must not say otherwise.
    return (0.0 if successes == 0 else float(low)), (1.0 if successes == n else float(high))


def bootstrap_interval(
    values: np.ndarray | Sequence[float], n: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """(low, high) of the mean of per-item values (N,), by n bootstrap resamples; for all 0 or all 1, Wilson's.

    Equal values other than 0 and 1 give an interval of zero width. Raises ValueError for no values or a NaN.
    """
    values = _checked(values)
    if _one_sided(values):
        return wilson_interval(int(values.sum()), len(values), level)
    return _middle(_resampled_means(values, n, np.random.default_rng(seed)), level)


def stratified_interval(
    groups: Sequence[np.ndarray | Sequence[float]],
    statistic: Callable[[np.ndarray], np.ndarray],
    n: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """(low, high) of a figure made of several tasks' means, the items of each task resampled among themselves.

    groups: per-item values of each of G tasks. statistic: means (..., G) -> figure (...), such as the mean of centred
    accuracies; called once with (n, G) and once with (G,). A task all right or all wrong is drawn from its Jeffreys
    posterior Beta(correct + 1/2, wrong + 1/2), so that it too contributes doubt. The interval always holds the figure.
    """
    rng = np.random.default_rng(seed)
    checked = [_checked(group) for group in groups]
    if not checked:
        raise ValueError("stratified_interval needs at least one group of values")
    means = np.empty((n, len(checked)))
    for i, values in enumerate(checked):
        if _one_sided(values):
            right = values.sum()
            means[:, i] = rng.beta(right + 0.5, len(values) - right + 0.5, n)
        else:
            means[:, i] = _resampled_means(values, n, rng)
    figure = float(statistic(np.array([values.mean() for values in checked])))
    low, high = _middle(statistic(means), level)
    return min(low, figure), max(high, figure)


def pass_at_k(n: int | np.ndarray, c: int | np.ndarray, k: int) -> np.ndarray:
    """The chance that at least one of k samples is right, unbiased, from n samples of which c were right.

    1 - C(n - c, k) / C(n, k), as a product so that nothing overflows (Chen et al. 2021). n and c broadcast; float64.
    Raises ValueError unless 1 <= k <= n and 0 <= c <= n.
    """
    n, c = np.broadcast_arrays(np.asarray(n, np.int64), np.asarray(c, np.int64))
    if k < 1 or (n < k).any() or (c < 0).any() or (c > n).any():
        raise ValueError(
            f"pass_at_k needs 1 <= k <= n and 0 <= c <= n, got k={k}, n={n.min()}.., c={c.min()}..{c.max()}"
        )
    wrong = np.ones(n.shape)
    for i in range(k):  # draw k without replacement: the chance that each is wrong too
        wrong *= np.maximum(n - c - i, 0) / (n - i)
    return 1.0 - wrong


def paired_difference(
    a: np.ndarray | Sequence[float],
    b: np.ndarray | Sequence[float],
    n: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float, float, float]:
    """(mean of a - b, low, high, p) of two systems' values on the same items, in the same order.

    The interval resamples pairs; where every pair differs alike it comes from Wilson's (equal everywhere: plus or minus
    the largest rate of disagreement that is still plausible). p is two-sided: McNemar's exact test for 0/1 values
    (1947; a fair coin for each item they disagree on), otherwise a sign-flip permutation test of 10,000 draws.
    Raises ValueError for different lengths.
    """
    a, b = _checked(a), _checked(b)
    if len(a) != len(b):
        raise ValueError(f"paired_difference needs the same items on both sides, got {len(a)} and {len(b)} values")
    difference = a - b
    binary = bool(np.isin(np.concatenate([a, b]), (0.0, 1.0)).all())
    if binary:
        p = _mcnemar(int((difference > 0).sum()), int((difference < 0).sum()))
    else:
        p = _sign_flip(difference, 10_000, np.random.default_rng(seed + 1))
    if binary and (difference == difference[0]).all():
        if difference[0] == 0:
            high = wilson_interval(0, len(a), level)[1]
            return 0.0, -high, high, p
        low, high = wilson_interval(len(a), len(a), level)
        return (1.0, low, high, p) if difference[0] > 0 else (-1.0, -high, -low, p)
    low, high = _middle(_resampled_means(difference, n, np.random.default_rng(seed)), level)
    return float(difference.mean()), low, high, p


def _checked(values: np.ndarray | Sequence[float]) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or len(values) == 0 or np.isnan(values).any():
        raise ValueError(f"an interval needs a list of at least one number and no NaN, got shape {values.shape}")
    return values


def _one_sided(values: np.ndarray) -> bool:
    return values[0] in (0.0, 1.0) and bool((values == values[0]).all())


def _resampled_means(values: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Means of n resamples (n,). Only the counts of the distinct values matter: few of them are drawn as counts."""
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) <= 16:
        return rng.multinomial(len(values), counts / len(values), size=n) @ distinct / len(values)
    block = max(1, _BLOCK // len(values))
    parts = [min(block, n - begin) for begin in range(0, n, block)]
    return np.concatenate([values[rng.integers(0, len(values), (rows, len(values)))].mean(1) for rows in parts])


def _middle(figures: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(figures, [0.5 - level / 2, 0.5 + level / 2])
    return float(low), float(high)


def _mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided p of a fair coin that fell only_a : only_b."""
    from scipy.stats import binomtest

    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def _sign_flip(difference: np.ndarray, draws: int, rng: np.random.Generator) -> float:
    """Two-sided p that differences are symmetric about 0: how often random signs give as large a sum."""
    observed, extreme = abs(difference.sum()), 1
    block = max(1, _BLOCK // len(difference))
    for begin in range(0, draws, block):
        signs = rng.integers(0, 2, (min(block, draws - begin), len(difference))) * 2 - 1
        extreme += int((np.abs(signs @ difference) >= observed - 1e-12).sum())
    return extreme / (draws + 1)
