"""The definition of every fused op in plain PyTorch: any device, any float type, differentiable by autograd.

Shapes: R rows (response tokens), V vocabulary, D hidden size, S sequences (responses), G groups.
Shape, type and device mistakes raise ValueError naming the argument. What only the values can tell (an index out of
range, a non-finite log-prob) never reads out of bounds and surfaces as NaN, because asking would stall the device.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from rethinker_kernels.arguments import (
    Surrogate,
    check_group_advantages,
    check_grpo,
    check_index,
    check_linear,
    check_logits,
    check_temperature,
)

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-this: exp(20) is already far outside any clip range, and fp32 sums of it stay finite."""

GRPO_STATS: tuple[str, ...] = (
    "tokens",  # tokens that count: unmasked, with a non-zero weight
    "nonfinite",  # of these, tokens whose log-prob, now, then or of the reference, is not finite
    "clipped_low",  # finite tokens with A < 0 whose ratio fell below 1 - clip_low: no gradient
    "clipped_high",  # finite tokens with A > 0 whose ratio rose above 1 + clip_high: no gradient
    "dual_clipped",  # finite tokens with A < 0 whose ratio rose above dual_clip: no gradient
    "ratio_sum",  # importance ratio
    "old_kl_sum",  # k3 estimate of KL(behaviour || policy)
    "kl_sum",  # chosen estimate of KL(policy || reference); 0 without one
)
"""Fields of `grpo_loss`'s statistics, in order. All are sums over finite tokens: they add over batches and ranks."""

LINEAR_GRPO_STATS: tuple[str, ...] = (*GRPO_STATS, "entropy_sum")
"""Fields of `linear_grpo_loss`'s statistics, in order."""


# Log-probabilities


def selective_log_softmax(
    logits: Tensor, index: Tensor, *, temperature: float | Tensor = 1.0, return_entropy: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of one chosen entry per row, and the row's entropy.

        log_probs = (logits.float() / temperature).log_softmax(-1)
        logps, entropy = log_probs.gather(-1, index[..., None])[..., 0], -(log_probs.exp() * log_probs).sum(-1)

    Args:
        logits: [..., V] floating; -inf marks a banned entry and is legal in values and gradients.
        index: [...] int64. An index outside [0, V) turns its row into NaN and gives it no gradient.
        temperature: one float >= 0, or a tensor [...] with one per row (not differentiated). 0 is the limit: all mass
            on the largest logits, no gradient. A negative or NaN temperature in a tensor turns its row into NaN.
        return_entropy: also return the entropy of the tempered distribution, in nats.

    Returns:
        logps [...], and entropy [...] if asked; fp32 (fp64 for fp64 logits). Both differentiable in `logits`.

    Raises:
        ValueError: a shape, type or device that does not fit, or a temperature below 0.
    """
    check_logits(logits)
    check_index(index, logits.shape[:-1], logits.device)
    temperature = check_temperature(temperature, index)

    vocabulary = logits.shape[-1]
    log_probs = _temper(logits.to(wide(logits)), temperature).log_softmax(-1)
    valid = (index >= 0) & (index < vocabulary)
    nan = torch.full((), math.nan, dtype=log_probs.dtype, device=logits.device)
    chosen = log_probs.gather(-1, torch.where(valid, index, 0).unsqueeze(-1)).squeeze(-1)
    logps = torch.where(valid, chosen, nan)
    if not return_entropy:
        return logps
    # A banned entry adds 0 to the entropy; 0 * -inf would make it, and its gradient, NaN.
    entropy = -(log_probs.exp() * log_probs.masked_fill(log_probs == -math.inf, 0.0)).sum(-1)
    return logps, torch.where(valid, entropy, nan)


def linear_selective_log_softmax(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of one chosen token per hidden state, and the entropy.

        logits = hidden @ weight.T + bias
        logps, entropy = selective_log_softmax(logits, index, temperature=temperature, return_entropy=True)

    Args:
        hidden: [R, D] floating.
        weight: [V, D], the head, of the same type.
        index: [R] int64, as in `selective_log_softmax`.
        bias: [V] of the same type, or None.
        temperature: a float, or a tensor [R], as in `selective_log_softmax`.
        return_entropy: also return the entropy, in nats.

    Returns:
        logps [R], and entropy [R] if asked; fp32 (fp64 for fp64 inputs). Differentiable in hidden, weight and bias.

    Raises:
        ValueError: a shape, type or device that does not fit, or a temperature below 0.
    """
    check_linear(hidden, weight, bias)
    check_index(index, hidden.shape[:1], hidden.device)
    temperature = check_temperature(temperature, index)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return selective_log_softmax(logits, index, temperature=temperature, return_entropy=return_entropy)


# The GRPO objective


def grpo_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    ref_logps: Tensor | None = None,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    normalizer: float | Tensor,
    **options,
) -> tuple[Tensor, Tensor]:
    """`rethinker_kernels.grpo_loss` by its formula: arguments, results and errors are written there.

    Args:
        options: the fields of `Surrogate`.
    """
    surrogate = Surrogate(**options)
    check_grpo(
        logps,
        old_logps,
        advantages,
        surrogate,
        cu_seqlens=cu_seqlens,
        ref_logps=ref_logps,
        weights=weights,
        mask=mask,
        normalizer=normalizer,
    )
    dtype = wide(logps)
    sequence = None if cu_seqlens is None else sequence_of_row(cu_seqlens, logps)
    advantage = per_row("advantages", advantages, cu_seqlens, sequence, logps).detach().to(dtype)
    active = active_rows(logps, cu_seqlens, sequence, weights, mask)

    # Rows that do not count become harmless before any arithmetic: a 0 gradient times inf or NaN would still be NaN.
    now = torch.where(active, logps.to(dtype), 0.0)
    then = torch.where(active, old_logps.detach().to(dtype), 0.0)
    advantage = torch.where(active, advantage, 0.0)
    difference = now - then
    if surrogate.importance == "sequence":
        difference = sequence_mean(difference, active, sequence, cu_seqlens)
        difference = torch.where(active, difference.gather(0, sequence), 0.0)
    log_ratio = clamp_log_ratio(difference)
    ratio = log_ratio.exp()

    low = (advantage < 0) & (ratio < 1 - surrogate.clip_low)
    high = (advantage > 0) & (ratio > 1 + surrogate.clip_high)
    bounded = torch.where(low, 1 - surrogate.clip_low, torch.where(high, 1 + surrogate.clip_high, ratio))
    dual = (advantage < 0) & (ratio > surrogate.dual_clip) if surrogate.dual_clip is not None else torch.zeros_like(low)
    if surrogate.dual_clip is not None:
        bounded = torch.where(dual, surrogate.dual_clip, bounded)
    token_loss = -bounded * advantage  # [R]

    finite = active & difference.isfinite()
    kl = torch.zeros_like(now)
    if ref_logps is not None:
        reference = torch.where(active, ref_logps.detach().to(dtype), 0.0)
        kl = kl_estimate(clamp_log_ratio(reference - now), surrogate.kl_estimator)
        finite = finite & reference.isfinite()
    if surrogate.kl_coef != 0:
        token_loss = token_loss + surrogate.kl_coef * kl
    if weights is not None:
        weight = per_row("weights", weights, cu_seqlens, sequence, logps).detach().to(dtype)
        token_loss = token_loss * torch.where(active, weight, 0.0)
    if surrogate.aggregation == "sequence":
        token_loss = sequence_mean(token_loss, active, sequence, cu_seqlens)
    loss = token_loss.sum() / normalizer

    with torch.no_grad():
        fields = {
            "tokens": active,
            "nonfinite": active & ~finite,
            "clipped_low": low & finite,
            "clipped_high": high & finite,
            "dual_clipped": dual & finite,
            "ratio_sum": torch.where(finite, ratio, 0.0),
            "old_kl_sum": torch.where(finite, exp_minus_linear(clamp_log_ratio(now - then)), 0.0),
            "kl_sum": torch.where(finite, kl, 0.0),
        }
        stats = torch.stack([fields[name].sum(dtype=torch.float64) for name in GRPO_STATS])
    return loss, stats


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    nll_weights: Tensor | None = None,
    **loss,
) -> tuple[Tensor, Tensor, Tensor]:
    """`rethinker_kernels.linear_grpo_loss` by its formula; `loss` are the keyword arguments of `grpo_loss`."""
    logps, entropy = linear_selective_log_softmax(
        hidden, weight, index, bias=bias, temperature=temperature, return_entropy=True
    )
    value, stats = grpo_loss(logps, old_logps, advantages, **loss)
    if nll_weights is not None:
        value = value - (nll_weights * torch.where(nll_weights != 0, logps, 0.0)).sum()
    with torch.no_grad():
        cu_seqlens, weights, mask = (loss.get(name) for name in ("cu_seqlens", "weights", "mask"))
        sequence = None if cu_seqlens is None else sequence_of_row(cu_seqlens, logps)
        counts = active_rows(logps, cu_seqlens, sequence, weights, mask) & entropy.isfinite()
        entropy_sum = torch.where(counts, entropy, 0.0).sum(dtype=torch.float64)
    return value, logps.detach(), torch.cat([stats, entropy_sum[None]])


# Advantages


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

    The standard deviation is the sample one (divided by n - 1), as in TRL, verl and OpenRLHF. A group is degenerate
    when its largest and smallest reward are equal, by comparison and not by a small std; its advantages are exactly 0.
    A group of one is degenerate.

    Args:
        rewards: [S] floating.
        group_offsets: [G + 1] int32 or int64: group g holds rewards group_offsets[g] to group_offsets[g + 1];
            groups may have any size, none included.
        scale: what centred rewards are divided by.
        eps: added to the standard deviation, so that rewards that differ by rounding only stay small; >= 0.

    Returns:
        advantages: [S] of the rewards' type (at least fp32). NaN for a group with a NaN reward.
        degenerate: [G] bool.

    Raises:
        ValueError: a shape, type, device or option that does not fit, naming it.
    """
    check_group_advantages(rewards, group_offsets, scale, eps)
    group = sequence_of_row(group_offsets, rewards)
    rewards = rewards.detach().to(wide(rewards))
    count = group_offsets.diff().to(rewards.dtype)  # [G]

    lowest = rewards.new_full(count.shape, math.inf).scatter_reduce(0, group, rewards, "amin")
    highest = rewards.new_full(count.shape, -math.inf).scatter_reduce(0, group, rewards, "amax")
    degenerate = (highest == lowest) | (count == 0)

    # Counting from the group's lowest reward, in units of its range, keeps rewards that nearly agree exact.
    span = torch.where(degenerate, 1.0, highest - lowest)  # [G]
    units = (rewards - lowest[group]) / span[group]  # [S] in [0, 1]
    centred = units - segment_sum(units, group, count)[group] / count[group]
    if scale == "std":
        variance = segment_sum(centred.square(), group, count) / (count - 1).clamp(min=1)
        advantages = centred / (variance.sqrt() + eps / span)[group]
    else:
        advantages = centred * span[group]
        if scale == "batch" and rewards.numel() > 1:
            advantages = advantages / (rewards.std() + eps)
    return torch.where(degenerate[group], 0.0, advantages), degenerate


# Pieces


def wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _temper(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """Logits over temperature, up to a constant per row."""
    if isinstance(temperature, float):
        if temperature == 1.0:
            return logits
        temperature = torch.full((), temperature, dtype=logits.dtype, device=logits.device)
    temperature = temperature.detach().to(logits.dtype).unsqueeze(-1)
    # Below the maximum before dividing: at a small temperature only losers may overflow, to -inf, which is right.
    below = logits - logits.detach().amax(-1, keepdim=True)
    frozen = torch.where(below == 0, 0.0, -math.inf).to(logits.dtype)
    tempered = torch.where(temperature > 0, below / torch.where(temperature > 0, temperature, 1.0), frozen)
    return torch.where(temperature >= 0, tempered, math.nan)


def clamp_log_ratio(log_ratio: Tensor) -> Tensor:
    """Within +-MAX_LOG_RATIO; infinities become NaN, in value and gradient, so that no clamp hides them."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO) + (log_ratio - log_ratio)


def kl_estimate(d: Tensor, estimator: str) -> Tensor:
    if estimator == "k1":
        return -d
    return d.square() / 2 if estimator == "k2" else exp_minus_linear(d)


def exp_minus_linear(d: Tensor) -> Tensor:
    """exp(d) - d - 1 to full relative precision: its Taylor series near 0, where the subtraction cancels."""
    near = d.abs() < 0.25
    x = torch.where(near, d, 0.0)
    series = torch.ones_like(x)
    for k in range(14, 2, -1):  # 1 + x/3 (1 + x/4 (1 + ... x/14)): enough for fp64, derivative included
        series = 1 + x / k * series
    far = torch.where(near, 1.0, d)
    return torch.where(near, x * x / 2 * series, far.expm1() - far)


def sequence_of_row(offsets: Tensor, rows: Tensor) -> Tensor:
    """[R] int64: which sequence each row belongs to."""
    position = torch.arange(rows.shape[0], device=rows.device)
    found = torch.searchsorted(offsets[1:].long().contiguous(), position, right=True)
    return found.clamp(max=max(offsets.numel() - 2, 0))


def segment_sum(values: Tensor, segment: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=values.dtype).index_add(0, segment, values)


def sequence_mean(values: Tensor, active: Tensor, sequence: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[S]: mean of each sequence's active rows; 0 where it has none."""
    like = cu_seqlens[1:]
    count = segment_sum(active.to(values.dtype), sequence, like)
    return segment_sum(torch.where(active, values, 0.0), sequence, like) / count.clamp(min=1)


def per_row(name: str, values: Tensor, cu_seqlens: Tensor | None, sequence: Tensor | None, rows: Tensor) -> Tensor:
    """Advantages or weights, [R] or, with sequences, [S], as [R]."""
    sequences = None if cu_seqlens is None else cu_seqlens.numel() - 1
    rows_win = name == "weights" and values.shape[0] == rows.shape[0]
    return values if values.shape[0] != sequences or rows_win else values[sequence]


def active_rows(
    logps: Tensor, cu_seqlens: Tensor | None, sequence: Tensor | None, weights: Tensor | None, mask: Tensor | None
) -> Tensor:
    """[R] bool: unmasked, and of a weight that is not 0."""
    active = torch.ones_like(logps, dtype=torch.bool) if mask is None else mask
    if weights is not None:
        active = active & (per_row("weights", weights, cu_seqlens, sequence, logps) != 0)
    return active
