"""assign_advantages: law 8, the effective-query ratio, and rewards that cannot be used."""

from __future__ import annotations

import math
import statistics

import pytest

from rethinker.algorithm.advantages import assign_advantages
from rethinker.config import ConfigError
from tests.algorithm.examples import group


def test_advantages_are_group_normalised_rewards():
    """A_i = (r_i - mean) / std of the group, with the sample standard deviation."""
    rewards = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0]
    groups = [group(rewards), group([0.0, 0.5])]
    assert assign_advantages(groups, "std") == 1.0
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
def test_ratio_counts_groups_whose_rewards_differ(scale):
    """Law 8: equal rewards, whatever their value, and G = 1 are not effective and get exact zeros."""
    groups = [group([0.1] * 7), group([1.0, 0.0]), group([0.7]), group([0.0] * 8), group([1 / 3] * 3)]
    assert assign_advantages(groups, scale) == 0.2
    for each in groups:
        assert any(a != 0 for a in each.advantages) == each.effective
        assert all(math.isfinite(a) for a in each.advantages)


@pytest.mark.parametrize("scale", ["std", "none", "batch"])
def test_rewards_that_differ_in_the_last_bit_are_effective(scale):
    """Law 8: degenerate is max == min: 0.1 + 0.2 and 0.3 differ, and agree with `Group.effective`."""
    near = group([0.1 + 0.2, 0.3, 0.3, 0.3])
    assert assign_advantages([near], scale) == 1.0 and near.effective
    assert near.advantages[0] > 0 > near.advantages[1]
    assert max(map(abs, near.advantages)) < 1e-6  # a difference of rounding stays a small advantage


@pytest.mark.gpu
@pytest.mark.parametrize("scale", ["std", "none", "batch"])
def test_a_gpu_assigns_the_same_advantages(scale):
    """On CUDA, in the fused kernel: the CPU's advantages to rounding, its exact zeros, its effective groups, also where
    rewards differ in the last bit of fp64 only."""
    rewards = [[0.1] * 7, [1.0, 0.0], [0.7], [0.1 + 0.2, 0.3, 0.3, 0.3], [1 / 3] * 3, [0.0, 0.5, 1.0], [1e-300, 0.0]]
    groups = {device: list(map(group, rewards)) for device in ("cpu", "cuda")}
    ratios = {device: assign_advantages(groups[device], scale, device) for device in groups}
    assert ratios["cpu"] == ratios["cuda"]
    for ours, theirs in zip(groups["cuda"], groups["cpu"], strict=True):
        assert ours.advantages == pytest.approx(theirs.advantages, rel=1e-7, abs=0)
        assert any(a != 0 for a in ours.advantages) == ours.effective


def test_no_groups():
    """Nothing to do, and no division by zero."""
    assert assign_advantages([], "std") == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_names_its_query(bad):
    """The message names the setting, the query and the value."""
    with pytest.raises(ConfigError, match=rf"reward\.function.*'broken'.*{bad}"):
        assign_advantages([group([0.0, 1.0]), group([0.0, bad], name="broken")], "std")


def test_a_missing_reward_names_its_query():
    """A group with fewer rewards than responses is refused."""
    short = group([0.0, 1.0], name="short")
    short.rewards.pop()
    with pytest.raises(ConfigError, match="'short' has 2 responses but 1 rewards"):
        assign_advantages([short], "std")
