"""How sure a figure is that is a mean over rows: 95 % intervals, and what two scorings of the same rows differ by."""

# N rows.

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import NormalDist, fmean

Z = NormalDist().inv_cdf(0.975)
RESAMPLES = 4000


def interval(scores_N: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of scores between 0 and 1: Wilson's where all are 0 or 1, else of the bootstrap's percentiles.

    Sources: Wilson 1927; Efron 1979. Raises ValueError without rows.

    >>> low, high = interval([1.0] * 80 + [0.0] * 20)
    >>> round(low, 3), round(high, 3)
    (0.711, 0.867)
    """
    n, mean = len(scores_N), fmean(scores_N)
    if set(scores_N) <= {0.0, 1.0}:
        middle = (mean + Z**2 / (2 * n)) / (1 + Z**2 / n)
        half = Z / (1 + Z**2 / n) * (mean * (1 - mean) / n + Z**2 / (4 * n**2)) ** 0.5
        return min(mean, max(0.0, middle - half)), max(mean, min(1.0, middle + half))  # at 0 and 1 rounding passes them
    return _resampled(scores_N)


def gain(before_N: Sequence[float], after_N: Sequence[float]) -> tuple[float, float, float]:
    """What the mean has gained, and its 95 % interval, of rows that were scored twice: they are drawn again with both scores."""
    moved_N = [after - before for before, after in zip(before_N, after_N, strict=True)]
    return fmean(moved_N), *_resampled(moved_N)


def _resampled(values_N: Sequence[float]) -> tuple[float, float]:
    """The percentiles 2.5 and 97.5 of the mean of as many rows drawn with replacement, by a fixed seed."""
    import numpy as np

    draw, values = np.random.default_rng(0), np.asarray(values_N, dtype=np.float64)
    kinds, counts = np.unique(
        values, return_counts=True
    )  # few where scores are 0 and 1: counts of them are drawn at once
    means = draw.multinomial(len(values), counts / len(values), size=RESAMPLES) @ kinds / len(values)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def confusion(pairs: Iterable[tuple[str, str]], labels: Sequence[str]) -> list[list[int]]:
    """Rows by their right label, columns by the given one, both in the order of the labels.

    >>> confusion([("a", "a"), ("a", "b"), ("b", "b")], ["a", "b"])
    [[1, 1], [0, 1]]
    """
    counts = Counter(pairs)
    return [[counts[right, given] for given in labels] for right in labels]
