"""group_advantages: group-normalised rewards."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from rethinker_kernels.arguments import check, check_choice, check_offsets, wide
from rethinker_kernels.losses import segment_sum, sequence_of_row


def group_advantages(
    rewards: Tensor,
    group_offsets: Tensor,
    *,
    scale: Literal["std", "none"] = "std",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Rewards relative to their group's mean, scaled (GRPO).

        centred = rewards - mean_of_group
        advantages = centred / (std_of_group + eps)     # "none": centred

    The standard deviation is the sample one (divided by n - 1). A group is degenerate when its largest and smallest
    reward are equal, by comparison and not by a small std; its advantages are exactly 0. A group of one is degenerate.
    Plain PyTorch on any device, without asking it for a value.

    Args:
        rewards: [S] floating.
        group_offsets: [G + 1] int32 or int64: group g holds rewards group_offsets[g] to group_offsets[g + 1];
            groups may have any size, none included. Rewards that no group holds are an error that is not checked.
        scale: what centred rewards are divided by.
        eps: added to the standard deviation, so that rewards that differ by rounding only stay small; >= 0.

    Returns:
        advantages: [S] of the rewards' type (at least fp32). NaN for a group with a NaN reward.
        degenerate: [G] bool.

    Raises:
        ValueError: a shape, type, device or option that does not fit, naming it.
    """
    check("rewards", rewards, (rewards.numel(),))
    check_choice("scale", scale, "std", "none")
    if not eps >= 0:
        raise ValueError(f"eps={eps}: must be at least 0")
    check_offsets("group_offsets", group_offsets, rewards)
    group = sequence_of_row(group_offsets, rewards)
    rewards = rewards.detach().to(wide(rewards))
    count = group_offsets.diff().to(rewards.dtype)  # [G]

    lowest = rewards.new_full(count.shape, math.inf).scatter_reduce(0, group, rewards, "amin")
    highest = rewards.new_full(count.shape, -math.inf).scatter_reduce(0, group, rewards, "amax")
    degenerate = (highest == lowest) | (count == 0)

    # Counting from the group's lowest reward, in units of its range, keeps rewards that nearly agree exact.
    span = torch.where(degenerate, 1.0, highest - lowest)  # [G]
    units = (rewards - lowest[group]) / span[group]  # [S] in [0, 1]
    centred = units - segment_sum(units, group, len(count))[group] / count[group]
    if scale == "std":
        variance = segment_sum(centred.square(), group, len(count)) / (count - 1).clamp(min=1)
        advantages = centred / (variance.sqrt() + eps / span)[group]
    else:
        advantages = centred * span[group]
    return torch.where(degenerate[group], 0.0, advantages), degenerate
