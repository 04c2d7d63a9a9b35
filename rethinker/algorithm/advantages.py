"""Rewards to advantages: how much better a response is than the others to the same query."""

from __future__ import annotations

import math

import torch

from rethinker.config import ConfigError
from rethinker.samples import Group
from rethinker_kernels import group_advantages
from rethinker_kernels.devices import to_device


def assign_advantages(groups: list[Group], scale: str, device: torch.device | str = "cpu") -> float:
    """Fill `group.advantages` from `group.rewards` (GRPO).

    Computed in fp64 on the rewards as they are, so that an advantage differs from 0 only where the group is
    `effective`: its largest and smallest reward differ. A group of one, or of equal rewards, gets exact zeros.

    Args:
        groups: groups with one finite reward per completion. With `scale="batch"` these are the batch.
        scale: `algorithm.advantage_scale`: "std", "none" or "batch".
        device: where to compute; one wait for the result.

    Returns:
        effective_query_ratio: share of the groups whose rewards differ; 0 without groups.

    Raises:
        ConfigError: a missing or non-finite reward, naming the query.
    """
    if not groups:
        return 0.0
    for group in groups:
        if len(group.rewards) != len(group.completions):
            raise ConfigError(
                f"reward.function: query {group.query.id!r} has {len(group.completions)} responses "
                f"but {len(group.rewards)} rewards; return one for each"
            )
        for reward in group.rewards:
            if not math.isfinite(reward):
                raise ConfigError(
                    f"reward.function: a response to query {group.query.id!r} got {reward}; return a finite number"
                )
    sizes = torch.tensor([0] + [len(group.rewards) for group in groups])
    rewards = torch.tensor([reward for group in groups for reward in group.rewards], dtype=torch.float64)
    rewards, offsets = (to_device(tensor, device) for tensor in (rewards, sizes.cumsum(0)))
    found = group_advantages(rewards, offsets, scale=scale)
    advantages, degenerate = torch.cat(found).cpu().split([len(rewards), len(groups)])
    for group, values in zip(groups, advantages.split(sizes[1:].tolist()), strict=True):
        group.advantages = values.tolist()
    return (1.0 - degenerate).mean().item()
