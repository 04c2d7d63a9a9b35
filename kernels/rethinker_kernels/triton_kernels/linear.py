"""Logits of some rows into log-probs, entropies and the gradient of GRPO's loss: one kernel, one program per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rethinker_kernels.arguments import Surrogate
from rethinker_kernels.devices import on_device_of
from rethinker_kernels.triton_kernels.grpo_loss import ESTIMATORS, bounds, divergence, surrogate
from rethinker_kernels.triton_kernels.log_softmax import (
    chosen_column,
    chosen_logit,
    inverse_and_scale,
    join,
    log_prob_and_entropy,
    row_lanes,
    write_gradient,
    write_zeros,
)
from rethinker_kernels.triton_kernels.tiles import tiles


@triton.jit
def grpo_rows_kernel(
    logits, out, index, temperatures, temperature, old_logps, advantages, factors, ref_logps, nll_weights, logps,
    entropies, stride, out_stride, vocabulary, lower, upper, dual, kl_coef,
    PER_ROW: tl.constexpr, ESTIMATOR: tl.constexpr, SUPERVISED: tl.constexpr,
    DEPTH: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Reads the row twice: for log-prob and entropy, then for the gradient. ESTIMATOR is 0 without a KL term."""
    row = tl.program_id(0)
    x = logits + row.to(tl.int64) * stride
    place = out + row.to(tl.int64) * out_stride
    inverse, scale = inverse_and_scale(temperatures, temperature, row, PER_ROW)
    chosen = chosen_column(tl.load(index + row), vocabulary)
    x_chosen = chosen_logit(x, chosen)
    lane_top, lane_s, lane_u = row_lanes(x, 0, vocabulary, scale, True, DEPTH, LANES)
    top, s, u = join(lane_top, lane_s, lane_u, scale)
    logp, entropy = log_prob_and_entropy(x_chosen, top, s, u, inverse)
    tl.store(logps + row, logp)
    tl.store(entropies + row, entropy)

    # A row that does not count has factor 0; its other values may be anything, NaN included.
    factor = tl.load(factors + row)
    per_logp = 0.0
    if factor != 0.0:
        _, slope, _, _, _, _ = surrogate(
            logp - tl.load(old_logps + row).to(tl.float32), tl.load(advantages + row), lower, upper, dual
        )
        if ESTIMATOR > 0:
            _, kl_slope = divergence(tl.load(ref_logps + row).to(tl.float32), logp, ESTIMATOR)
            slope += kl_coef * kl_slope
        per_logp = slope * factor
    if SUPERVISED:
        per_logp -= tl.load(nll_weights + row)
    # The gradient may take the logits' place: all threads have read the chosen one before any overwrites it.
    tl.debug_barrier()
    if (chosen >= 0) & (inverse < float("inf")) & (per_logp != 0.0):
        per_logit = per_logp * inverse
        write_gradient(x, place, 0, vocabulary, chosen, top, tl.log2(s), scale, per_logit, 0.0, 0.0, False, TILE)
    else:
        write_zeros(place, 0, vocabulary, TILE)


def grpo_rows(
    logits: Tensor,
    index: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    old_logps: Tensor,
    advantages: Tensor,
    factors: Tensor,
    ref_logps: Tensor | None,
    nll_weights: Tensor | None,
    options: Surrogate,
    *,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [R] fp32; the gradient of the logits goes into `out`.

    Args:
        logits: [R, V] with columns side by side.
        out: [R, V] of any type; may be the logits themselves.
        factors: [R] fp32, what each row's loss is multiplied by; 0 where it does not count.
        advantages: [R] fp32. The rest as in `rethinker_kernels.linear_grpo_loss`, per row.
    """
    rows, vocabulary = logits.shape
    logps = torch.empty(rows, dtype=torch.float32, device=logits.device)
    entropies = torch.empty_like(logps)
    if rows == 0:
        return logps, entropies
    tile = tiles(logits.device).of_rows(rows)
    with on_device_of(logits):
        grpo_rows_kernel[(rows,)](
            logits, out, index, temperatures, temperature, old_logps, advantages, factors, ref_logps,
            nll_weights, logps, entropies,
            logits.stride(0), out.stride(0), vocabulary, *bounds(options), options.kl_coef,
            PER_ROW=temperatures is not None,
            ESTIMATOR=ESTIMATORS[options.kl_estimator] if options.kl_coef != 0 else 0,
            SUPERVISED=nll_weights is not None, DEPTH=tile.depth, LANES=tile.lane_bytes // logits.element_size(),
            TILE=tile.gradient, num_warps=tile.warps,
        )  # fmt: skip
    return logps, entropies
