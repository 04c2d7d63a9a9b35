"""group_advantages against the formula written out group by group, and its degenerate cases."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch

from rethinker_kernels import group_advantages

GROUPS = [[1.0, 0.0, 0.0, 1.0], [0.5], [], [1.0, 1.0, 1.0], [0.0, 0.5, 1.0], [-3.0, 2.0]]
REWARDS = torch.tensor([r for g in GROUPS for r in g], dtype=torch.float64)
OFFSETS = torch.tensor([0, *itertools.accumulate(map(len, GROUPS))])


@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.1])
def test_equals_the_naive_formula(scale, eps):
    """Reward minus the group's mean, over the sample standard deviation of the group, or over nothing."""
    expected = []
    for rewards in GROUPS:
        for reward in rewards:
            if max(rewards) == min(rewards):
                expected.append(0.0)
                continue
            centred = reward - statistics.fmean(rewards)
            expected.append(centred / (statistics.stdev(rewards) + eps) if scale == "std" else centred)
    advantages, degenerate = group_advantages(REWARDS, OFFSETS, scale=scale, eps=eps)
    torch.testing.assert_close(advantages, torch.tensor(expected, dtype=torch.float64))
    assert degenerate.tolist() == [False, True, True, True, False, False]
    assert group_advantages(REWARDS.float(), OFFSETS.int(), scale=scale, eps=eps)[0].dtype == torch.float32


@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("value", [0.1, 0.3, 1 / 3, 1e-20, 1e8, -0.7])
@pytest.mark.parametrize("size", [3, 7, 8])
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_equal_rewards_give_exact_zeros(scale, value, size, eps):
    """Law 8: rewards equal to each other give 0, though their mean may be off by rounding (3 * 0.1 / 3 != 0.1)."""
    advantages, degenerate = group_advantages(torch.full((size,), value), torch.tensor([0, size]), scale=scale, eps=eps)
    assert advantages.eq(0).all() and degenerate.all()


@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize(("a", "b"), [(0.1 + 0.2, 0.3), (1.0, 1.0 + 2**-52), (1e-170, 2e-170), (1e-300, 0.0)])
def test_nearly_equal_rewards_are_not_degenerate(scale, a, b):
    """Law 8: rewards that differ in the last bit differ: their advantages are finite, not 0 and of the right sign."""
    advantages, degenerate = group_advantages(
        torch.tensor([b, a, b, b], dtype=torch.float64), torch.tensor([0, 4]), scale=scale
    )
    assert degenerate.tolist() == [False]
    assert advantages.isfinite().all() and (advantages[1] > 0) == (a > b) and (advantages[0] < 0) == (a > b)
    assert advantages.ne(0).all()
    assert advantages.abs().max() < 1  # eps keeps a difference of rounding from counting like a right answer


def test_scaled_advantages_have_unit_sample_variance():
    """With eps = 0 the advantages of every group that differs have mean 0 and sample variance 1."""
    sizes = torch.tensor([1e-200, 1e-9, 1e-3, 1, 1e3, 1e200], dtype=torch.float64)
    rewards = torch.rand(6, 8, dtype=torch.float64) * sizes[:, None]
    advantages, _ = group_advantages(rewards.flatten(), torch.arange(0, 49, 8), eps=0.0)
    torch.testing.assert_close(advantages.view(6, 8).var(1), torch.ones(6, dtype=torch.float64))
    assert advantages.view(6, 8).mean(1).abs().max() < 1e-12


@pytest.mark.parametrize("scale", ["std", "none"])
def test_no_rewards(scale):
    """No groups, and only empty groups, give empty advantages."""
    for groups in (0, 3):
        advantages, degenerate = group_advantages(
            torch.zeros(0), torch.zeros(groups + 1, dtype=torch.int64), scale=scale
        )
        assert advantages.shape == (0,) and degenerate.tolist() == [True] * groups


def test_nan_reward_stays_visible_in_its_group():
    """A NaN reward makes its own group NaN, not 0, and leaves the others alone."""
    advantages, _ = group_advantages(torch.tensor([0.0, math.nan, 0.0, 1.0]), torch.tensor([0, 2, 4]))
    assert advantages.isnan().tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("rewards", {"rewards": torch.zeros(4, dtype=torch.int64)}),
        ("rewards", {"rewards": torch.zeros(2, 2)}),
        ("group_offsets", {"group_offsets": torch.tensor([0.0, 4.0])}),
        ("group_offsets", {"group_offsets": torch.tensor([0])}),
        ("scale", {"scale": "range"}),
        ("eps", {"eps": -1.0}),
    ],
)
def test_wrong_arguments_are_named(name, changes):
    """What does not fit raises ValueError whose message starts with the argument's name."""
    with pytest.raises(ValueError, match=f"^{name}"):
        group_advantages(**{"rewards": torch.zeros(4), "group_offsets": torch.tensor([0, 4])} | changes)
