"""How sure an accuracy is: Wilson's interval; for two models on the same questions an interval and McNemar's test."""

from __future__ import annotations

from math import sqrt

Z95 = 1.959963984540054  # two-sided 95% of the normal distribution


def wilson_interval(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95% score interval of a share `right / n`; (0, 1) without questions.

    Source: Wilson (1927); Newcombe (1998), Statistics in Medicine 17:857, method 3.
    """
    if n == 0:
        return 0.0, 1.0
    p, z2 = right / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value that two models on the same questions are equally good.

    Args:
        only_first, only_second: questions that one of them alone answered right; the others tell nothing.
    """
    from scipy.stats import binomtest

    discordant = only_first + only_second
    return float(binomtest(only_first, discordant, 0.5).pvalue) if discordant else 1.0


def paired_difference(both: int, only_first: int, only_second: int, neither: int) -> tuple[float, float, float]:
    """Second model's accuracy minus the first's on the same questions, with a 95% interval: (difference, low, high).

    Source: Newcombe (1998), Statistics in Medicine 17:2635, method 10: Wilson intervals of both accuracies, squared and
    added with their correlation.
    """
    n = both + only_first + only_second + neither
    first, second = both + only_first, both + only_second
    p1, p2 = first / n, second / n
    (low1, high1), (low2, high2) = wilson_interval(first, n), wilson_interval(second, n)
    product = first * (n - first) * second * (n - second)
    covariance = both * neither - only_first * only_second
    if covariance > 0:
        covariance = max(0.0, covariance - n / 2)  # continuity correction
    phi = covariance / sqrt(product) if product else 0.0

    def add(a: float, b: float) -> float:
        return sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))

    difference = p2 - p1
    return difference, difference - add(p2 - low2, high1 - p1), difference + add(high2 - p2, p1 - low1)
