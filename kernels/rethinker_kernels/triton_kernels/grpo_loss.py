"""GRPO's clipped surrogate: loss, statistics and gradient in one launch, and a second that adds up partial sums.

A program takes one sequence, or a block of rows where there are no sequences. Each writes its own partial sums, which
are then added in a fixed order: two runs agree bit for bit.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rethinker_kernels.arguments import Surrogate
from rethinker_kernels.devices import on_device_of
from rethinker_kernels.triton_kernels.tiles import tiles

MAX_LOG_RATIO = tl.constexpr(20.0)

SUMS = tl.constexpr(16)
"""Width of a row of partial sums: the loss, then the statistics in the order of GRPO_STATS, then nothing."""

ESTIMATORS = {"k1": 1, "k2": 2, "k3": 3}


@triton.jit
def clamped(x):
    """Within +-MAX_LOG_RATIO, and NaN for infinities, so that no clamp hides them."""
    return tl.minimum(tl.maximum(x, -MAX_LOG_RATIO), MAX_LOG_RATIO) + (x - x)


@triton.jit
def exp_series(x, FIRST: tl.constexpr):
    """1 + x/FIRST (1 + x/(FIRST + 1) (1 + ... x/14)), to full precision for |x| < 1."""
    series = tl.full(x.shape, 1.0, tl.float32)
    for i in tl.static_range(FIRST, 15):
        series = 1.0 + x * (1.0 / (14 + FIRST - i)) * series
    return series


@triton.jit
def exp_minus_one(x):
    near = tl.abs(x) < 1.0
    small = tl.where(near, x, 0.0)
    return tl.where(near, small * exp_series(small, 2), tl.exp(x) - 1.0)


@triton.jit
def exp_minus_linear(x):
    """exp(x) - x - 1; by its series near 0, where the subtraction cancels."""
    near = tl.abs(x) < 1.0
    small = tl.where(near, x, 0.0)
    return tl.where(near, small * small * 0.5 * exp_series(small, 3), tl.exp(x) - x - 1.0)


@triton.jit
def surrogate(difference, advantage, lower, upper, dual):
    """-clipped ratio * advantage, its slope in the log-ratio, the ratio, and which of the three clips acted."""
    ratio = tl.exp(clamped(difference))
    low = (advantage < 0) & (ratio < lower)
    high = (advantage > 0) & (ratio > upper)
    beyond = (advantage < 0) & (ratio > dual)
    bounded = tl.where(beyond, dual, tl.where(low, lower, tl.where(high, upper, ratio)))
    flat = low | high | beyond | (tl.abs(difference) > MAX_LOG_RATIO)
    slope = tl.where(flat, 0.0, -ratio * advantage) + (difference - difference)
    return -bounded * advantage, slope, ratio, low, high, beyond


@triton.jit
def divergence(reference, now, ESTIMATOR: tl.constexpr):
    """The KL estimate with d = reference - now, and its slope in `now`."""
    raw = reference - now
    d = clamped(raw)
    if ESTIMATOR == 1:
        value = -d
        slope = tl.full(d.shape, 1.0, tl.float32)
    elif ESTIMATOR == 2:
        value = d * d * 0.5
        slope = -d
    else:
        value = exp_minus_linear(d)
        slope = -exp_minus_one(d)
    return value, tl.where(tl.abs(raw) > MAX_LOG_RATIO, 0.0, slope) + (raw - raw)


@triton.jit
def is_finite(x):
    return x - x == 0.0


@triton.jit
def row_inputs(
    rows, end, sequence, logps, old_logps, advantages, weights, mask,
    ADVANTAGES: tl.constexpr, WEIGHTS: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """(active, weight, advantage, now, then) of rows below `end`. A row that does not count is never read: it is 0.

    ADVANTAGES and WEIGHTS say what these are given for: "rows", "sequences", or None.
    """
    active = rows < end
    if MASK:
        active = active & (tl.load(mask + rows, mask=active, other=0) != 0)
    weight = tl.full(rows.shape, 1.0, tl.float32)
    if WEIGHTS == "rows":
        weight = tl.load(weights + rows, mask=active, other=0.0).to(tl.float32)
    elif WEIGHTS == "sequences":
        weight = weight * tl.load(weights + sequence).to(tl.float32)
    active = active & (weight != 0.0)
    weight = tl.where(active, weight, 0.0)
    if ADVANTAGES == "rows":
        advantage = tl.load(advantages + rows, mask=active, other=0.0).to(tl.float32)
    else:
        advantage = tl.where(active, tl.load(advantages + sequence).to(tl.float32), 0.0)
    now = tl.load(logps + rows, mask=active, other=0.0).to(tl.float32)
    then = tl.load(old_logps + rows, mask=active, other=0.0).to(tl.float32)
    return active, weight, advantage, now, then


@triton.jit(do_not_specialize=["count", "sequences"])
def loss_kernel(
    logps, old_logps, advantages, ref_logps, weights, mask, offsets, normalizers, gradient, partial,
    count, sequences, lower, upper, dual, kl_coef, normalizer,
    SEQUENCES: tl.constexpr, ADVANTAGES: tl.constexpr, WEIGHTS: tl.constexpr, MASK: tl.constexpr,
    ESTIMATOR: tl.constexpr, SHARED_RATIO: tl.constexpr, MEAN: tl.constexpr, NORMALIZERS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient [R] and this program's partial sums. ESTIMATOR is 0 without reference log-probs."""
    program = tl.program_id(0)
    if SEQUENCES:
        start = tl.maximum(tl.load(offsets + program), 0).to(tl.int32)
        end = tl.minimum(tl.load(offsets + program + 1), count).to(tl.int32)
    else:
        start = program * BLOCK
        end = tl.minimum(start + BLOCK, count)
    if NORMALIZERS:
        normalizer = tl.load(normalizers).to(tl.float32)
    lanes = tl.arange(0, BLOCK)

    tokens = 0.0
    mean = 0.0
    if SHARED_RATIO or MEAN:
        counted = tl.zeros([BLOCK], tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for first in range(start, end, BLOCK):
            active, weight, advantage, now, then = row_inputs(
                first + lanes, end, program, logps, old_logps, advantages, weights, mask, ADVANTAGES, WEIGHTS, MASK
            )
            counted += tl.where(active, 1.0, 0.0)
            total += now - then
        tokens = tl.maximum(tl.sum(counted, axis=0), 1.0)
        mean = tl.sum(total, axis=0) / tokens
    factor = 1.0 / normalizer
    if MEAN:
        factor = factor / tokens

    loss_sum = tl.zeros([BLOCK], tl.float32)
    token_sum = tl.zeros([BLOCK], tl.float32)
    nonfinite_sum = tl.zeros([BLOCK], tl.float32)
    low_sum = tl.zeros([BLOCK], tl.float32)
    high_sum = tl.zeros([BLOCK], tl.float32)
    dual_sum = tl.zeros([BLOCK], tl.float32)
    ratio_sum = tl.zeros([BLOCK], tl.float32)
    old_kl_sum = tl.zeros([BLOCK], tl.float32)
    kl_sum = tl.zeros([BLOCK], tl.float32)
    slope_sum = tl.zeros([BLOCK], tl.float32)
    for first in range(start, end, BLOCK):
        rows = first + lanes
        active, weight, advantage, now, then = row_inputs(
            rows, end, program, logps, old_logps, advantages, weights, mask, ADVANTAGES, WEIGHTS, MASK
        )
        difference = now - then
        if SHARED_RATIO:
            difference = tl.where(active, mean, 0.0)
        loss, slope, ratio, low, high, beyond = surrogate(difference, advantage, lower, upper, dual)
        finite = active & is_finite(difference)
        kl_slope = tl.zeros([BLOCK], tl.float32)
        if ESTIMATOR > 0:
            reference = tl.load(ref_logps + rows, mask=active, other=0.0).to(tl.float32)
            kl, kl_slope = divergence(reference, now, ESTIMATOR)
            finite = finite & is_finite(reference)
            loss = tl.where(kl_coef != 0.0, loss + kl_coef * kl, loss)
            kl_slope = tl.where(kl_coef != 0.0, kl_coef * kl_slope, 0.0)
            kl_sum += tl.where(finite, kl, 0.0)
        loss_sum += tl.where(active, loss * weight, 0.0)
        token_sum += tl.where(active, 1.0, 0.0)
        nonfinite_sum += tl.where(active & (finite == 0), 1.0, 0.0)
        low_sum += tl.where(low & finite, 1.0, 0.0)
        high_sum += tl.where(high & finite, 1.0, 0.0)
        dual_sum += tl.where(beyond & finite, 1.0, 0.0)
        ratio_sum += tl.where(finite, ratio, 0.0)
        old_kl_sum += tl.where(finite, exp_minus_linear(clamped(now - then)), 0.0)
        if SHARED_RATIO:
            slope_sum += tl.where(active, slope * weight, 0.0)
            own = kl_slope
        else:
            own = slope + kl_slope
        tl.store(gradient + rows, tl.where(active, own * weight * factor, 0.0), mask=rows < end)

    if SHARED_RATIO:
        # Every row moved the one ratio by 1 / tokens, so each gets the same share of all rows' slopes.
        share = tl.sum(slope_sum, axis=0) / tokens * factor
        tl.debug_barrier()
        for first in range(start, end, BLOCK):
            rows = first + lanes
            active, weight, advantage, now, then = row_inputs(
                rows, end, program, logps, old_logps, advantages, weights, mask, ADVANTAGES, WEIGHTS, MASK
            )
            own = tl.load(gradient + rows, mask=active, other=0.0)
            tl.store(gradient + rows, own + share, mask=active)

    place = partial + program * SUMS
    tl.store(place, tl.sum(loss_sum, axis=0) * factor)
    tl.store(place + 1, tl.sum(token_sum, axis=0))
    tl.store(place + 2, tl.sum(nonfinite_sum, axis=0))
    tl.store(place + 3, tl.sum(low_sum, axis=0))
    tl.store(place + 4, tl.sum(high_sum, axis=0))
    tl.store(place + 5, tl.sum(dual_sum, axis=0))
    tl.store(place + 6, tl.sum(ratio_sum, axis=0))
    tl.store(place + 7, tl.sum(old_kl_sum, axis=0))
    tl.store(place + 8, tl.sum(kl_sum, axis=0))


@triton.jit(do_not_specialize=["programs"])
def total_kernel(partial, loss, stats, programs, STATS: tl.constexpr, BLOCK: tl.constexpr):
    """Loss and statistics from all programs' partial sums; one program, fp64."""
    column = tl.arange(0, SUMS)[None, :]
    total = tl.zeros([BLOCK, SUMS], tl.float64)
    for first in range(0, programs, BLOCK):
        row = (first + tl.arange(0, BLOCK))[:, None]
        total += tl.load(partial + row * SUMS + column, mask=(row < programs) & (column <= STATS), other=0.0)
    field = tl.arange(0, SUMS)
    sums = tl.sum(total, axis=0)
    tl.store(stats + field - 1, sums, mask=(field >= 1) & (field <= STATS))
    tl.store(loss + field, sums.to(tl.float32), mask=field == 0)


def bounds(options: Surrogate) -> tuple[float, float, float]:
    """The ratios at which the lower, the upper and the dual clip act."""
    return 1.0 - options.clip_low, 1.0 + options.clip_high, math.inf if options.dual_clip is None else options.dual_clip


def loss_and_gradient(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor | None,
    ref_logps: Tensor | None,
    weights: Tensor | None,
    mask: Tensor | None,
    normalizers: Tensor | None,
    normalizer: float,
    options: Surrogate,
    *,
    statistics: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [], stats [statistics] fp64 and d loss / d logps [R] fp32. Arguments as in `rethinker_kernels.grpo_loss`.

    Args:
        normalizers: the normaliser as a tensor of one number, instead of `normalizer`.
    """
    rows = logps.shape[0]
    sequences = None if cu_seqlens is None else cu_seqlens.numel() - 1
    tile = tiles(logps.device)
    programs = triton.cdiv(rows, tile.tokens) if sequences is None else sequences
    gradient = torch.empty(rows, dtype=torch.float32, device=logps.device)
    if rows == 0 or programs == 0:
        zeros = torch.zeros(1 + statistics, dtype=torch.float64, device=logps.device)
        return zeros[0].to(torch.float32), zeros[1:].clone(), gradient
    loss = torch.empty((), dtype=torch.float32, device=logps.device)
    stats = torch.empty(statistics, dtype=torch.float64, device=logps.device)
    partial = torch.empty(programs, SUMS.value, dtype=torch.float32, device=logps.device)
    given = [None if t is None else t.contiguous() for t in (logps, old_logps, advantages, ref_logps, weights)]
    with on_device_of(logps):
        loss_kernel[(programs,)](
            *given, None if mask is None else mask.contiguous().view(torch.uint8),
            None if cu_seqlens is None else cu_seqlens.contiguous(), normalizers, gradient, partial,
            rows, sequences or 0, *bounds(options), options.kl_coef, normalizer,
            SEQUENCES=sequences is not None,
            # Where there are as many rows as sequences, advantages belong to sequences and weights to rows.
            ADVANTAGES="sequences" if advantages.shape[0] == sequences else "rows",
            WEIGHTS=None if weights is None else "rows" if weights.shape[0] == rows else "sequences",
            MASK=mask is not None, ESTIMATOR=0 if ref_logps is None else ESTIMATORS[options.kl_estimator],
            SHARED_RATIO=options.importance == "sequence", MEAN=options.aggregation == "sequence",
            NORMALIZERS=normalizers is not None, BLOCK=tile.tokens, num_warps=tile.token_warps,
        )  # fmt: skip
        total_kernel[(1,)](partial, loss, stats, programs, STATS=statistics, BLOCK=64, num_warps=4)
    return loss, stats, gradient
