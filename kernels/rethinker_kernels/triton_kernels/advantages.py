"""Group-normalised rewards: one warp per group, which reads a group of usual size once, into registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rethinker_kernels.devices import on_device_of
from rethinker_kernels.triton_kernels.tiles import tiles


@triton.jit
def group_kernel(
    rewards, offsets, batch_std, advantages, degenerate, count, eps,
    STD: tl.constexpr, BATCH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Advantages of one group of any size. Rewards count from the lowest, in units of the group's range.

    In fp64 where the rewards are: what differs only beyond fp32 differs.
    """
    WIDE: tl.constexpr = tl.float64 if rewards.dtype.element_ty == tl.float64 else tl.float32
    group = tl.program_id(0)
    start = tl.maximum(tl.load(offsets + group), 0).to(tl.int64)
    end = tl.minimum(tl.load(offsets + group + 1), count).to(tl.int64)
    lanes = tl.arange(0, BLOCK)

    lowest = tl.full([BLOCK], float("inf"), WIDE)
    highest = tl.full([BLOCK], -float("inf"), WIDE)
    for first in range(start, end, BLOCK):
        inside = first + lanes < end
        reward = tl.load(rewards + first + lanes, mask=inside, other=0.0).to(WIDE)
        lowest = tl.where(inside, tl.minimum(lowest, reward), lowest)
        highest = tl.where(inside, tl.maximum(highest, reward), highest)
    low = tl.min(lowest, axis=0)
    high = tl.max(highest, axis=0)
    size = (end - start).to(WIDE)

    # The comparison of extremes ignores a NaN reward; sums of the rewards themselves do not.
    total = tl.zeros([BLOCK], WIDE)
    nan = tl.zeros([BLOCK], WIDE)
    same = high == low
    span = tl.where(same, 1.0, high - low)
    for first in range(start, end, BLOCK):
        inside = first + lanes < end
        reward = tl.load(rewards + first + lanes, mask=inside, other=0.0).to(WIDE)
        total += tl.where(inside, (reward - low) / span, 0.0)
        nan += tl.where(reward != reward, 1.0, 0.0)
    mean = tl.sum(total, axis=0) / size
    same = (same & (tl.sum(nan, axis=0) == 0.0)) | (end <= start)
    tl.store(degenerate + group, same.to(tl.int8))

    if STD:
        squares = tl.zeros([BLOCK], WIDE)
        for first in range(start, end, BLOCK):
            inside = first + lanes < end
            reward = tl.load(rewards + first + lanes, mask=inside, other=0.0).to(WIDE)
            centred = tl.where(inside, (reward - low) / span - mean, 0.0)
            squares += centred * centred
        variance = tl.sum(squares, axis=0) / tl.maximum(size - 1.0, 1.0)
        factor = 1.0 / (tl.sqrt(variance) + eps / span)
    else:
        factor = span
        if BATCH:
            factor = span / (tl.load(batch_std).to(WIDE) + eps)
    for first in range(start, end, BLOCK):
        inside = first + lanes < end
        reward = tl.load(rewards + first + lanes, mask=inside, other=0.0).to(WIDE)
        advantage = tl.where(same, 0.0, ((reward - low) / span - mean) * factor)
        tl.store(advantages + first + lanes, advantage, mask=inside)


def group_advantages(rewards: Tensor, group_offsets: Tensor, scale: str, eps: float) -> tuple[Tensor, Tensor]:
    """(advantages [S], degenerate [G] bool); arguments as in `rethinker_kernels.group_advantages`."""
    groups = group_offsets.numel() - 1
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    advantages = torch.empty(rewards.shape[0], dtype=dtype, device=rewards.device)
    degenerate = torch.empty(groups, dtype=torch.bool, device=rewards.device)
    if groups == 0:
        return advantages, degenerate
    whole_batch = scale == "batch" and rewards.shape[0] > 1
    batch_std = rewards.to(dtype).std() if whole_batch else None
    tile = tiles(rewards.device)
    with on_device_of(rewards):
        group_kernel[(groups,)](
            rewards.contiguous(), group_offsets.contiguous(), batch_std, advantages, degenerate.view(torch.int8),
            rewards.shape[0], eps, STD=scale == "std", BATCH=whole_batch, BLOCK=tile.group, num_warps=1,
        )  # fmt: skip
    return advantages, degenerate
