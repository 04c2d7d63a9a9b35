"""assign_advantages: law 8, and the scales."""

from __future__ import annotations

import math
import statistics

import pytest

from rethinker.algorithm.advantages import assign_advantages
from tests.algorithm.examples import group


def test_advantages_are_group_normalised_rewards():
    """A_i = (r_i - mean) / std of the group, with the sample standard deviation."""
    rewards = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0]
    groups = [group(rewards), group([0.0, 0.5])]
    assign_advantages(groups, "std")
    spread = statistics.stdev(rewards)
    expected = [(r - statistics.fmean(rewards)) / spread for r in rewards]
    assert groups[0].advantages == pytest.approx(expected, rel=1e-5)
    assert groups[1].advantages == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)], rel=1e-5)


def test_no_scale_and_batch_scale():
    """`none` only centres; `batch` divides by the standard deviation of all rewards."""
    groups = [group([1.0, 0.0]), group([1.0, 1.0, 1.0, 0.0])]
    assign_advantages(groups, "none")
    assert groups[0].advantages == [0.5, -0.5] and groups[1].advantages == [0.25, 0.25, 0.25, -0.75]
    assign_advantages(groups, "batch")
    spread = statistics.stdev([1.0, 0.0, 1.0, 1.0, 1.0, 0.0])
    assert groups[1].advantages[3] == pytest.approx(-0.75 / spread, rel=1e-5)


@pytest.mark.parametrize("scale", ["std", "none", "batch"])
def test_groups_of_equal_rewards_get_zeros(scale):
    """Law 8: equal rewards, whatever their value, and G = 1 are not effective and get exact zeros."""
    groups = [group([0.1] * 7), group([1.0, 0.0]), group([0.7]), group([0.0] * 8), group([1 / 3] * 3)]
    assign_advantages(groups, scale)
    assert [each.effective for each in groups] == [False, True, False, False, False]
    for each in groups:
        assert any(a != 0 for a in each.advantages) == each.effective
        assert all(math.isfinite(a) for a in each.advantages)


@pytest.mark.parametrize("scale", ["std", "none", "batch"])
def test_rewards_that_differ_in_the_last_bit_are_effective(scale):
    """Law 8: degenerate is max == min: 0.1 + 0.2 and 0.3 differ, and agree with `Group.effective`."""
    near = group([0.1 + 0.2, 0.3, 0.3, 0.3])
    assign_advantages([near], scale)
    assert near.effective and near.advantages[0] > 0 > near.advantages[1]
    assert max(map(abs, near.advantages)) < 1e-6  # a difference of rounding stays a small advantage


@pytest.mark.gpu
@pytest.mark.parametrize("scale", ["std", "none", "batch"])
def test_a_gpu_assigns_the_same_advantages(scale):
    """On CUDA, in the fused kernel: the CPU's advantages to rounding, its exact zeros, its effective groups, also where
    rewards differ in the last bit of fp64 only."""
    rewards = [[0.1] * 7, [1.0, 0.0], [0.7], [0.1 + 0.2, 0.3, 0.3, 0.3], [1 / 3] * 3, [0.0, 0.5, 1.0], [1e-300, 0.0]]
    groups = {device: list(map(group, rewards)) for device in ("cpu", "cuda")}
    for device in groups:
        assign_advantages(groups[device], scale, device)
    for ours, theirs in zip(groups["cuda"], groups["cpu"], strict=True):
        assert ours.advantages == pytest.approx(theirs.advantages, rel=1e-7, abs=0)
        assert any(a != 0 for a in ours.advantages) == ours.effective
