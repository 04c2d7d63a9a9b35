"""95% intervals: of a share of questions, of a mean over seeds, and of differences, paired or not; McNemar's test."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from math import sqrt

from scipy.stats import binomtest, t


def wilson_interval(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95% score interval of a share `right / n`; (0, 1) without questions.

    Source: Wilson (1927); Newcombe (1998), Statistics in Medicine 17:857, method 3.
    """
    return tuple(map(float, binomtest(right, n).proportion_ci(0.95, "wilson"))) if n else (0.0, 1.0)


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value that two models are equally good, by the questions that one alone answered right."""
    discordant = only_first + only_second
    return float(binomtest(only_first, discordant, 0.5).pvalue) if discordant else 1.0


def paired_difference(both: int, only_first: int, only_second: int, neither: int) -> tuple[float, float, float]:
    """Second model's accuracy minus the first's on the same questions, with a 95% interval: (difference, low, high).

    Source: Newcombe (1998), Statistics in Medicine 17:2635, method 10: Wilson intervals of both accuracies, squared and
    added with their correlation.
    """
    n = both + only_first + only_second + neither
    first, second = both + only_first, both + only_second
    product = first * (n - first) * second * (n - second)
    covariance = both * neither - only_first * only_second
    if covariance > 0:
        covariance = max(0.0, covariance - n / 2)  # continuity correction
    return _squared_and_added(first, n, second, n, covariance / sqrt(product) if product else 0.0)


def unpaired_difference(first: int, of_first: int, second: int, of_second: int) -> tuple[float, float, float]:
    """Second share, `second` of `of_second` questions, minus the first, with a 95% interval: (difference, low, high).

    Source: Newcombe (1998), Statistics in Medicine 17:873, method 10: that of the paired one without a correlation.
    """
    return _squared_and_added(first, of_first, second, of_second, 0.0)


def _squared_and_added(first: int, n1: int, second: int, n2: int, phi: float) -> tuple[float, float, float]:
    p1, p2 = first / n1, second / n2
    (low1, high1), (low2, high2) = wilson_interval(first, n1), wilson_interval(second, n2)

    def add(a: float, b: float) -> float:
        return sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))

    difference = p2 - p1
    return difference, difference - add(p2 - low2, high1 - p1), difference + add(high2 - p2, p1 - low1)


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half-width of its 95% interval (Student's t); a single value has none."""
    if len(values) < 2:
        return values[0], None
    error = statistics.stdev(values) / sqrt(len(values))
    return statistics.fmean(values), float(t.ppf(0.975, len(values) - 1)) * error


def difference_of_means(first: Sequence[float], second: Sequence[float]) -> tuple[float, float | None]:
    """Second mean minus the first, and half the width of its 95% interval (Welch's t); a single value on a side has
    none."""
    difference = statistics.fmean(second) - statistics.fmean(first)
    if min(len(first), len(second)) < 2:
        return difference, None
    errors = [statistics.variance(values) / len(values) for values in (first, second)]
    total = sum(errors)
    if not total:
        return difference, 0.0
    freedom = total**2 / sum(e**2 / (len(v) - 1) for e, v in zip(errors, (first, second), strict=True))
    return difference, float(t.ppf(0.975, freedom)) * sqrt(total)
