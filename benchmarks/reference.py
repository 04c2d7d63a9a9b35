"""The definition of the fused ops in plain PyTorch: the baseline of the benchmarks, and what the tests compare with.

Any device, any float type, differentiable by autograd. The loss of a token is defined in rethinker_kernels/losses.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rethinker_kernels import losses

grpo_loss = losses.grpo_loss


def selective_log_softmax(
    logits: Tensor,
    index: Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
    softcap: float | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`rethinker_kernels.selective_log_softmax` by its formula."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    log_probs = _temper(logits, temperature).log_softmax(-1)
    valid = (index >= 0) & (index < logits.shape[-1])
    chosen = log_probs.gather(-1, torch.where(valid, index, 0).unsqueeze(-1)).squeeze(-1)
    logps = torch.where(valid, chosen, math.nan)
    if not return_entropy:
        return logps
    # A banned entry adds 0 to the entropy; 0 * -inf would make it, and its gradient, NaN.
    entropy = -(log_probs.exp() * log_probs.masked_fill(log_probs == -math.inf, 0.0)).sum(-1)
    return logps, torch.where(valid, entropy, math.nan)


def linear_selective_log_softmax(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    return_entropy: bool = False,
    softcap: float | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`rethinker_kernels.linear_selective_log_softmax` by its lines, with all logits at once."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    options = {"temperature": temperature, "return_entropy": return_entropy, "softcap": softcap}
    return selective_log_softmax(logits, index, **options)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    loss: losses.Loss,
    old_logps: Tensor,
    advantages: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    nll_weights: Tensor | None = None,
    softcap: float | None = None,
    **given,
) -> tuple[Tensor, Tensor, Tensor]:
    """`rethinker_kernels.linear_policy_loss` by its lines, with all logits at once."""
    head = {"bias": bias, "temperature": temperature, "return_entropy": True, "softcap": softcap}
    logps, entropies = linear_selective_log_softmax(hidden, weight, index, **head)
    objective = losses.Objective(loss, logps.detach(), old_logps, advantages, **given)
    value = objective.total(logps, entropies)
    if nll_weights is not None:
        value = value - (nll_weights * torch.where(nll_weights != 0, logps, 0.0)).sum()
    counted = objective.measured.mask & entropies.isfinite()
    entropy_sum = torch.where(counted, entropies, 0.0).detach().sum(dtype=torch.float64)
    return value, logps.detach(), torch.cat([objective.statistics(logps), entropy_sum[None]])


def linear_grpo_loss(
    hidden: Tensor, weight: Tensor, index: Tensor, old_logps: Tensor, advantages: Tensor, **given
) -> tuple[Tensor, Tensor, Tensor]:
    """`linear_policy_loss` of `grpo`."""
    loss, given = losses.split_options(given)
    return linear_policy_loss(hidden, weight, index, loss, old_logps, advantages, **given)


def _temper(logits: Tensor, temperature: float) -> Tensor:
    """Logits over temperature, up to a constant per row."""
    if temperature == 1.0:
        return logits
    # Below the maximum before dividing: at a small temperature only losers may overflow, to -inf, which is right.
    below = logits - logits.detach().amax(-1, keepdim=True)
    if temperature > 0:
        return below / logits.new_full((1,), temperature)
    return below.masked_fill(below == 0, 0.0).masked_fill(below < 0, -math.inf)
