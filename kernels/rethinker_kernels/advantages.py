"""group_advantages: group-normalised rewards."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rethinker_kernels import reference
from rethinker_kernels.arguments import check_group_advantages
from rethinker_kernels.devices import takes_triton


def group_advantages(
    rewards: Tensor,
    group_offsets: Tensor,
    *,
    scale: Literal["std", "none", "batch"] = "std",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Rewards relative to their group's mean, scaled (GRPO).

        centred = rewards - mean_of_group
        advantages = centred / (std_of_group + eps)     # "batch": std of all rewards; "none": centred

    The standard deviation is the sample one (divided by n - 1). A group is degenerate when its largest and smallest
    reward are equal, by comparison and not by a small std; its advantages are exactly 0. A group of one is degenerate.
    One launch on a GPU ("batch": and one for the std).

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
    check_group_advantages(rewards, group_offsets, scale, eps)
    if takes_triton(group_offsets):  # the kernel takes fp64 rewards too
        return _group_advantages(rewards.detach(), group_offsets, scale, eps)
    return reference.group_advantages(rewards, group_offsets, scale=scale, eps=eps)


@torch.library.custom_op("rethinker::group_advantages", mutates_args=())
def _group_advantages(rewards: Tensor, group_offsets: Tensor, scale: str, eps: float) -> tuple[Tensor, Tensor]:
    from rethinker_kernels.triton_kernels.advantages import group_advantages

    return group_advantages(rewards, group_offsets, scale, eps)


@_group_advantages.register_fake
def _(rewards, group_offsets, scale, eps):
    groups = group_offsets.shape[0] - 1
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    return rewards.new_empty(rewards.shape, dtype=dtype), rewards.new_empty(groups, dtype=torch.bool)
