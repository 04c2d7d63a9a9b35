"""The definition of every fused op in plain PyTorch: any device, any float type, differentiable by autograd.

Shapes: R rows (response tokens), V vocabulary, D hidden size, S sequences (responses), G groups. The loss is defined in
losses.py. Mistakes of shape, type and device raise ValueError naming the argument. What only the values can tell (an
index out of range, a non-finite log-prob) never reads out of bounds and comes out as NaN: asking would stall a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rethinker_kernels import losses
from rethinker_kernels.arguments import (
    check_index,
    check_linear,
    check_logits,
    check_temperature,
    wide,
)

# Log-probabilities


def selective_log_softmax(
    logits: Tensor, index: Tensor, *, temperature: float | Tensor = 1.0, return_entropy: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """`rethinker_kernels.selective_log_softmax` by its formula: arguments, results and errors are written there."""
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
    """`rethinker_kernels.linear_selective_log_softmax` by its lines, with all logits at once."""
    check_linear(hidden, weight, bias)
    check_index(index, hidden.shape[:1], hidden.device)
    temperature = check_temperature(temperature, index)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return selective_log_softmax(logits, index, temperature=temperature, return_entropy=return_entropy)


# The loss over a head


grpo_loss = losses.grpo_loss


def linear_grpo_loss(
    hidden: Tensor, weight: Tensor, index: Tensor, old_logps: Tensor, advantages: Tensor, **given
) -> tuple[Tensor, Tensor, Tensor]:
    """`rethinker_kernels.linear_grpo_loss` by its lines, with all logits at once."""
    loss, given = losses.split_options(given)
    log_softmax = linear_selective_log_softmax
    return composed_loss(log_softmax, hidden, weight, index, loss, old_logps, advantages, **given)


def composed_loss(
    log_softmax: Callable[..., tuple[Tensor, Tensor]],
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    loss: losses.Loss,
    old_logps: Tensor,
    advantages: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    nll_weights: Tensor | None = None,
    **given,
) -> tuple[Tensor, Tensor, Tensor]:
    """`rethinker_kernels.linear_policy_loss` by its lines, on one implementation of linear_selective_log_softmax."""
    logps, entropies = log_softmax(hidden, weight, index, bias=bias, temperature=temperature, return_entropy=True)
    objective = losses.Objective(loss, logps.detach(), old_logps, advantages, **given)
    value = objective.total(logps)
    if nll_weights is not None:
        value = value - (nll_weights * torch.where(nll_weights != 0, logps, 0.0)).sum()
    stats = torch.cat([objective.statistics(logps), entropy_sum(entropies, objective.rows.mask)])
    return value, logps.detach(), stats


def entropy_sum(entropies: Tensor, mask: Tensor) -> Tensor:
    """[1] fp64: of the rows that count and whose entropy [R] is finite."""
    counts = mask & entropies.isfinite()
    return torch.where(counts, entropies, 0.0).detach().sum(dtype=torch.float64)[None]


# Pieces


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
