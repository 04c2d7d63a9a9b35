"""Two kernels of linear_policy_loss: a row of logits into GRPO's gradient, and a gradient times that of its loss."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rethinker_kernels.arguments import row_temperature
from rethinker_kernels.devices import on_device_of
from rethinker_kernels.losses import Rows, Surrogate
from rethinker_kernels.triton_kernels.log_softmax import (
    chosen_column,
    chosen_logit,
    inverse_and_scale,
    join,
    log_prob_and_entropy,
    registers,
    row_lanes,
    tiles,
    write_gradient,
    write_zeros,
)

MAX_LOG_RATIO = tl.constexpr(20.0)

ESTIMATORS = {"k1": 1, "k2": 2, "k3": 3}

SCALED = 2048  # numbers that a program multiplies


@triton.jit
def clamped(x):
    """Within +-MAX_LOG_RATIO, and NaN for infinities, so that no clamp hides them."""
    return tl.minimum(tl.maximum(x, -MAX_LOG_RATIO), MAX_LOG_RATIO) + (x - x)


@triton.jit
def exp_minus_one(x):
    """To full precision: near 0, where the subtraction cancels, by its series x (1 + x/2 (1 + ... x/14))."""
    near = tl.abs(x) < 1.0
    small = tl.where(near, x, 0.0)
    series = tl.full(x.shape, 1.0, tl.float32)
    for i in tl.static_range(2, 15):
        series = 1.0 + small * (1.0 / (16 - i)) * series
    return tl.where(near, small * series, tl.exp(x) - 1.0)


@triton.jit
def surrogate_slope(difference, advantage, lower, upper, dual):
    """Of `losses.grpo` without its KL term, in the log-ratio."""
    ratio = tl.exp(clamped(difference))
    flat = ((advantage < 0) & (ratio < lower)) | ((advantage > 0) & (ratio > upper))
    flat = flat | ((advantage < 0) & (ratio > dual)) | (tl.abs(difference) > MAX_LOG_RATIO)
    return tl.where(flat, 0.0, -ratio * advantage) + (difference - difference)


@triton.jit
def divergence_slope(reference, now, ESTIMATOR: tl.constexpr):
    """Of `losses.kl_estimate` with d = reference - now, in `now`."""
    raw = reference - now
    d = clamped(raw)
    if ESTIMATOR == 1:
        slope = tl.full(d.shape, 1.0, tl.float32)
    elif ESTIMATOR == 2:
        slope = -d
    else:
        slope = -exp_minus_one(d)
    return tl.where(tl.abs(raw) > MAX_LOG_RATIO, 0.0, slope) + (raw - raw)


@triton.jit
def grpo_rows_kernel(
    logits, out, index, temperature, old_logps, advantages, factors, ref_logps, nll_weights, logps,
    entropies, stride, out_stride, vocabulary, lower, upper, dual, kl_coef, entropy_coef,
    SOFTCAP: tl.constexpr, ESTIMATOR: tl.constexpr, SUPERVISED: tl.constexpr, ENTROPY: tl.constexpr,
    DEPTH: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Reads the row twice: for log-prob and entropy, then for the gradient.

    ESTIMATOR is 0 without a KL term; ENTROPY says whether there is a bonus.
    """
    row = tl.program_id(0)
    x = logits + row.to(tl.int64) * stride
    place = out + row.to(tl.int64) * out_stride
    inverse, scale = inverse_and_scale(temperature)
    chosen = chosen_column(tl.load(index + row), vocabulary)
    x_chosen = chosen_logit(x, chosen, SOFTCAP)
    lane_top, lane_s, lane_u = row_lanes(x, vocabulary, scale, SOFTCAP, True, DEPTH, LANES)
    top, s, u = join(lane_top, lane_s, lane_u, scale)
    logp, entropy = log_prob_and_entropy(x_chosen, top, s, u, inverse)
    tl.store(logps + row, logp)
    tl.store(entropies + row, entropy)

    # A row that does not count has factor 0; its other values may be anything, NaN included.
    factor = tl.load(factors + row)
    per_logp = 0.0
    if factor != 0.0:
        old_logp = tl.load(old_logps + row).to(tl.float32)
        slope = surrogate_slope(logp - old_logp, tl.load(advantages + row), lower, upper, dual)
        if ESTIMATOR > 0:
            slope += kl_coef * divergence_slope(tl.load(ref_logps + row).to(tl.float32), logp, ESTIMATOR)
        per_logp = slope * factor
    if SUPERVISED:
        per_logp -= tl.load(nll_weights + row)
    per_entropy = 0.0
    if ENTROPY:
        per_entropy = -entropy_coef * factor
    # The gradient may take the logits' place: all threads have read the chosen one before any overwrites it.
    tl.debug_barrier()
    if (chosen >= 0) & (inverse < float("inf")) & ((per_logp != 0.0) | (per_entropy != 0.0)):
        write_gradient(
            x, place, vocabulary, chosen, top, tl.log2(s), scale, per_logp * inverse, per_entropy * inverse, entropy,
            SOFTCAP, ENTROPY, TILE,
        )  # fmt: skip
    else:
        write_zeros(place, vocabulary, TILE)


def grpo_rows(
    logits: Tensor,
    index: Tensor,
    temperature: float,
    rows: Rows,
    factors: Tensor,
    nll_weights: Tensor | None,
    options: Surrogate,
    entropy_coef: float = 0.0,
    softcap: float | None = None,
    *,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [R] fp32; the gradient of the logits goes into `out`.

    Args:
        logits: [R, V] with columns side by side.
        out: [R, V] of any type; may be the logits themselves.
        rows: of these logits.
        factors: [R] fp32, what each row's loss is multiplied by; 0 where it does not count.
        nll_weights: [R] fp32, as in `rethinker_kernels.linear_policy_loss`; so are `entropy_coef` and `softcap`.
    """
    count, vocabulary = logits.shape
    logps = torch.empty(count, dtype=torch.float32, device=logits.device)
    entropies = torch.empty_like(logps)
    if count == 0:
        return logps, entropies
    tile = tiles(logits.device, count)
    highest = math.inf if options.dual_clip is None else options.dual_clip
    with on_device_of(logits):
        grpo_rows_kernel[(count,)](
            logits, out, index, row_temperature(temperature, softcap), rows.old_logps, rows.advantages, factors,
            rows.ref_logps, nll_weights, logps, entropies,
            logits.stride(0), out.stride(0), vocabulary, 1.0 - options.clip_low, 1.0 + options.clip_high, highest,
            options.kl_coef, entropy_coef,
            SOFTCAP=softcap, ESTIMATOR=ESTIMATORS[options.kl_estimator] if options.kl_coef != 0 else 0,
            SUPERVISED=nll_weights is not None, ENTROPY=entropy_coef != 0, DEPTH=tile.depth,
            LANES=tile.lane_bytes // logits.element_size(), TILE=tile.gradient, num_warps=tile.warps,
            maxnreg=registers(softcap),
        )  # fmt: skip
    return logps, entropies


@triton.jit
def scaled_kernel(values, factor, out, count, TILE: tl.constexpr):
    """TILE numbers per program; there may be more than 2^31."""
    by = tl.load(factor).to(tl.float32)
    position = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = position < count
    x = tl.load(values + position, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + position, (x * by).to(out.dtype.element_ty), mask=inside)


def scaled(values: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """As `linear_loss.scaled`."""
    values = values.contiguous()
    out = torch.empty(values.shape, dtype=dtype, device=values.device)
    if count := values.numel():
        with on_device_of(values):
            scaled_kernel[(triton.cdiv(count, SCALED),)](values, factor, out, count, TILE=SCALED, num_warps=4)
    return out
