"""Rewards to advantages: how much better a response is than others, to the same query or in the same episode."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rethinker.config import AlgorithmConfig
from rethinker.samples import Group
from rethinker_kernels import group_advantages
from rethinker_kernels.devices import to_device

EPS = 1e-6
"""Added to a standard deviation, so that rewards that differ by rounding only stay small."""


def assign_advantages(
    groups: list[Group], config: AlgorithmConfig, weights: Mapping[str, float], device: torch.device | str = "cpu"
) -> None:
    """Fill `group.advantages`, one finite number per completion, from the rewards of all groups of an episode.

        A_i = (r_i - baseline_i) / scale                        # `advantage_baseline` and `advantage_scale`
        A_i = sum_f w_f A_i(f), then A_i / std of all A_i       # `advantages_per_reward`: r(f) the values of function f

    The last rule is GDPO (arXiv 2601.05242); the mean that it takes off, of all A_i, is 0 already.
    Computed in fp64 on the rewards as they are: where `group_advantages` calls a group degenerate its advantages are
    exactly 0, so that an advantage differs from 0 only where the rewards (of a function) of its group differ. With
    `advantage_baseline: batch` the episode is the one group.

    Args:
        groups: of all ranks, the same on every rank.
        config: the settings of `algorithm`.
        weights: of each reward function, by its name in `group.scores`; read with `advantages_per_reward` alone.
        device: where to compute; one wait for the result.
    """
    counts = torch.tensor([len(group.rewards) for group in groups], dtype=torch.int64)
    sizes = counts if config.advantage_baseline != "batch" else counts.sum()[None]
    offsets = to_device(torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]), device)

    def of(rewards: list[list[float]]) -> Tensor:
        """[S]: advantages by these values of every response."""
        values = to_device(torch.tensor([r for of_group in rewards for r in of_group], dtype=torch.float64), device)
        return _advantages(values, offsets, config)

    if not config.advantages_per_reward:
        advantages = of([group.rewards for group in groups])
    else:
        parts = [weight * of([group.scores[name] for group in groups]) for name, weight in weights.items()]
        advantages = _over_all(torch.stack(parts).sum(0))
    for group, values in zip(groups, advantages.cpu().split(counts.tolist()), strict=True):
        group.advantages = values.tolist()


def _advantages(rewards: Tensor, offsets: Tensor, config: AlgorithmConfig) -> Tensor:
    """[S]: by rewards [S], where group g holds offsets[g] to offsets[g + 1].

    A reward minus the mean of the n - 1 others is n / (n - 1) times the same minus the mean of all n.
    """
    scale = "std" if config.advantage_scale == "std" else "none"
    advantages, _ = group_advantages(rewards, offsets, scale=scale, eps=EPS)
    if config.advantage_baseline == "leave_one_out":
        n = offsets.diff()
        factors = n.to(rewards) / (n - 1).clamp(min=1)
        advantages = advantages * factors.repeat_interleave(n, output_size=len(rewards))
    return _over_all(advantages) if config.advantage_scale == "batch" else advantages


def _over_all(advantages: Tensor) -> Tensor:
    """[S]: over their standard deviation. Their mean is 0: they are centred by group."""
    return advantages / (advantages.std() + EPS) if len(advantages) > 1 else advantages
