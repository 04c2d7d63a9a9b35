"""Rewards to advantages: how much better a response is than the others to the same query."""

from __future__ import annotations

import torch

from rethinker.samples import Group
from rethinker_kernels import group_advantages
from rethinker_kernels.devices import to_device


def assign_advantages(groups: list[Group], scale: str, device: torch.device | str = "cpu") -> None:
    """Fill `group.advantages` from `group.rewards`, one finite number per completion (GRPO).

    Computed in fp64 on the rewards as they are, so that an advantage differs from 0 only where the group is
    `effective`: its largest and smallest reward differ. A group of one, or of equal rewards, gets exact zeros.

    Args:
        scale: `algorithm.advantage_scale`: "std", "none" or "batch"; with "batch" the groups are the batch.
        device: where to compute; one wait for the result.
    """
    sizes = torch.tensor([0] + [len(group.rewards) for group in groups])
    rewards = torch.tensor([reward for group in groups for reward in group.rewards], dtype=torch.float64)
    rewards, offsets = (to_device(tensor, device) for tensor in (rewards, sizes.cumsum(0)))
    advantages, _ = group_advantages(rewards, offsets, scale=scale)
    for group, values in zip(groups, advantages.cpu().split(sizes[1:].tolist()), strict=True):
        group.advantages = values.tolist()
