"""Intervals and tests against published values and against what they promise."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
from scipy import stats

from rethinker.evaluation.intervals import (
    difference_of_means,
    mcnemar,
    mean_interval,
    paired_difference,
    unpaired_difference,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson(right, n, low, high):
    """Newcombe's (1998) worked examples, to his four digits; and the mirrored ones."""
    assert wilson_interval(right, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(n - right, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilson_at_the_ends():
    """Within 0 and 1, and no division by zero without questions."""
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(5, 5)[1] == 1.0 and wilson_interval(0, 5)[0] == 0.0


def test_mcnemar_is_the_exact_binomial_test():
    """Twice the tail of a fair coin over the questions that one model alone has right; the sides are alike."""
    tail = sum(comb(18, k) for k in (0, 1)) / 2**18
    assert mcnemar(17, 1) == mcnemar(1, 17) == pytest.approx(2 * tail)
    assert mcnemar(0, 0) == 1.0 and mcnemar(4, 4) == 1.0


def test_paired_difference_is_antisymmetric():
    """Exchanging the models turns the interval around; equal answers give 0 and an interval that holds it."""
    d, low, high = paired_difference(60, 17, 5, 18)
    assert d == pytest.approx((5 - 17) / 100)
    assert paired_difference(60, 5, 17, 18) == pytest.approx((-d, -high, -low))
    d, low, high = paired_difference(50, 0, 0, 50)
    assert d == 0 and low < 0 < high and high - low < 0.15


def test_paired_difference_covers_the_truth():
    """The interval holds the true difference in about 95% of samples, and is narrower than that of unpaired ones."""
    rng = np.random.default_rng(0)
    shares = np.array([0.5, 0.05, 0.15, 0.3])  # both, only the first, only the second, neither
    tables = rng.multinomial(120, shares, size=1000)
    intervals = np.array([paired_difference(*table.tolist())[1:] for table in tables])
    assert 0.93 < np.mean((intervals[:, 0] <= 0.1) & (intervals[:, 1] >= 0.1)) < 0.985
    unpaired = 2 * 1.96 * np.sqrt((0.55 * 0.45 + 0.65 * 0.35) / 120)
    assert np.mean(intervals[:, 1] - intervals[:, 0]) < 0.75 * unpaired


def test_unpaired_difference():
    """Newcombe's (1998) worked example, 56 of 70 against 48 of 80, to his four digits; it is the paired one's without a
    correlation, and turns around with the sides."""
    d, low, high = unpaired_difference(48, 80, 56, 70)
    assert (d, low, high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    assert unpaired_difference(56, 70, 48, 80) == pytest.approx((-d, -high, -low))
    assert unpaired_difference(50, 100, 50, 100) == pytest.approx(paired_difference(25, 25, 25, 25))


@pytest.mark.parametrize("values", [[0.5, 0.7], [0.5, 0.6, 0.9, 0.4, 0.55]])
def test_the_interval_of_a_mean(values):
    """scipy's one-sample t-test gives the same; one value has none, equal values one without width."""
    mean, half = mean_interval(values)
    assert (mean - half, mean + half) == pytest.approx(tuple(stats.ttest_1samp(values, 0).confidence_interval(0.95)))
    assert mean_interval([0.5]) == (0.5, None) and mean_interval([0.5, 0.5]) == (0.5, 0.0)


def test_the_difference_of_two_means():
    """scipy's Welch test gives the same interval; a single value on a side has none, and equal values no width."""
    first, second = [0.5, 0.6, 0.9, 0.4], [0.7, 0.72, 0.71]
    difference, half = difference_of_means(first, second)
    ends = stats.ttest_ind(second, first, equal_var=False).confidence_interval(0.95)
    assert (difference - half, difference + half) == pytest.approx(tuple(ends))
    assert difference_of_means([0.5], second)[1] is None
    assert difference_of_means([0.5, 0.5], [0.75, 0.75]) == (0.25, 0.0)
