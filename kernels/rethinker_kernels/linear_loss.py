"""linear_policy_loss: from hidden states to any loss and its gradients in one pass over chunks of rows.

Legend: R rows (response tokens), C rows of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rethinker_kernels.arguments import check, check_linear, check_softcap, check_temperature, wide
from rethinker_kernels.chunks import CPU_LOGITS_BYTES, slices
from rethinker_kernels.devices import takes_triton
from rethinker_kernels.linear import Gradients, Head, Logits, at, linear_selective_log_softmax, log_softmax_op
from rethinker_kernels.losses import Loss, Objective, split_options

if TYPE_CHECKING:
    from rethinker_kernels.triton_kernels.exponentials import Exponentials


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    loss: Loss,
    old_logps: Tensor,
    advantages: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    nll_weights: Tensor | None = None,
    softcap: float | None = None,
    **given,
) -> tuple[Tensor, Tensor, Tensor]:
    """Any loss on log-probs straight from hidden states and the head's weight, with an optional supervised term.

        logps, entropies = linear_selective_log_softmax(hidden, weight, index, ..., return_entropy=True)
        loss, stats = policy_loss(logps, loss, old_logps, advantages, entropies=entropies, ..., normalizer=normalizer)
        loss = loss - (nll_weights * logps).sum()

    The logits [R, V] are never held whole. All that decides a token's gradient is known before the forward pass, so the
    gradients of hidden, weight and bias are made in it: per chunk the log-probs, the loss's slope by autograd on a
    vector [C], and the logits turned into their gradient (an entropy bonus included, whose slope in a logit is that of
    H = -sum p log p: -p (log p + H) / temperature). That is 3 matrix products, where recomputing the logits would
    take 4 (`whole_sequences`, as with `importance="sequence"`, needs all log-probs first, and takes 4; so does a
    function under torch.compile, which is composed of the lines above). The backward pass only scales them.

    Args: those of the two functions, and
        nll_weights: [R] floating, or None. A token's counts whether or not `mask` leaves it out of the loss; the
            normalizer does not apply to it.

    Returns:
        loss: scalar, differentiable (once) in hidden, weight and bias.
        logps: [R], detached.
        stats: [len(LINEAR_GRPO_STATS)] fp64, named by LINEAR_GRPO_STATS, detached.

    Raises:
        ValueError: as the two functions.
    """
    check_linear(hidden, weight, bias, index)
    temperature, softcap = check_temperature(temperature), check_softcap(softcap)
    # The log-probs do not exist yet; a column of the hidden states has their shape and device.
    rows = hidden.detach()[:, :1].reshape(-1)
    objective = Objective(loss, rows, old_logps, advantages, **given)
    if nll_weights is not None:
        check("nll_weights", nll_weights, rows.shape, like=rows)
        nll_weights = nll_weights.detach().to(wide(hidden)).contiguous()
    if torch.compiler.is_compiling():
        head = {"bias": bias, "temperature": temperature, "return_entropy": True, "softcap": softcap}
        return _outcome(objective, nll_weights, *linear_selective_log_softmax(hidden, weight, index, **head))
    head = Head(hidden, weight, bias, index, temperature, softcap)
    learns = torch.is_grad_enabled()
    needs = tuple(learns and x is not None and x.requires_grad for x in (hidden, weight, bias))
    return _LinearPolicyLoss.apply(hidden, weight, bias, head, objective, nll_weights, needs)


def linear_grpo_loss(
    hidden: Tensor, weight: Tensor, index: Tensor, old_logps: Tensor, advantages: Tensor, **given
) -> tuple[Tensor, Tensor, Tensor]:
    """`linear_policy_loss` of `grpo`, whose options are among the keyword arguments.

    On a GPU without the product that leaves exponentials, one Triton kernel makes a chunk's log-probs, slopes and
    gradient of the logits.
    """
    loss, given = split_options(given)
    return linear_policy_loss(hidden, weight, index, loss, old_logps, advantages, **given)


class _LinearPolicyLoss(torch.autograd.Function):
    """(loss, logps, stats); the gradients of hidden, weight and bias are kept as `Gradients.wide` has them."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, head, objective, nll_weights, needs):
        if any(needs) and not objective.whole_sequences:
            logps, entropies, gradients = one_pass(head, objective, nll_weights, needs)
        else:
            logps, entropies, saved = log_softmax_op(*head, True)
            gradients = Gradients(head, needs)
            if any(needs):
                slopes = _slopes(objective, nll_weights, slice(None), logps)
                gradients.accumulate_log_softmax(saved, entropies, slopes, objective.entropy_slopes())
        loss, logps, stats = _outcome(objective, nll_weights, logps, entropies)
        ctx.set_materialize_grads(False)  # or zeros would be made for the outputs without one
        ctx.mark_non_differentiable(logps, stats)
        ctx.save_for_backward(*gradients.wide())
        ctx.needs, ctx.dtype = needs, hidden.dtype
        return loss, logps, stats

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            return (None,) * 7
        given = zip(ctx.saved_tensors, ctx.needs, strict=True)
        return *(scaled(g, grad_loss, ctx.dtype) if need else None for g, need in given), *(None,) * 4


def one_pass(
    head: Head, objective: Objective, nll_weights: Tensor | None, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Gradients]:
    """Log-probs [R], entropies [R] and gradients, each row's logits computed once."""
    logps = head.hidden.new_empty(len(head.hidden), dtype=wide(head.hidden))
    entropies = torch.empty_like(logps)
    has_kernel = objective.is_grpo and takes_triton(head.hidden)

    def close(rows: slice, part: Logits | Exponentials) -> Tensor | None:
        if has_kernel and isinstance(part, Logits):
            from rethinker_kernels.triton_kernels.linear_loss import grpo_rows

            known = objective.rows.at(rows), objective.factors[rows], at(nll_weights, rows), objective.surrogate
            of_rows = *part.chosen, *known, objective.entropy_coef, head.softcap
            logps[rows], entropies[rows] = grpo_rows(part.logits, *of_rows, out=part.out)
            return None
        logps[rows], entropies[rows], _ = part.measure(objective.rows.old_logps[rows], True)
        slopes, entropy_slopes = _slopes(objective, nll_weights, rows, logps[rows]), objective.entropy_slopes(rows)
        return part.close(slopes, *(() if entropy_slopes is None else (entropies[rows], entropy_slopes)))

    gradients = Gradients(head, needs)
    gradients.accumulate(close, exponentials=objective.entropy_coef == 0)
    return logps, entropies, gradients


def _slopes(objective: Objective, nll_weights: Tensor | None, rows: slice, logps: Tensor) -> Tensor:
    """d loss / d logps [C] of these rows, the supervised term included."""
    slopes = objective.slopes(logps, rows)
    return slopes if nll_weights is None else slopes - nll_weights[rows]


def _outcome(
    objective: Objective, nll_weights: Tensor | None, logps: Tensor, entropies: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What `linear_policy_loss` returns, from the log-probs and entropies of all rows."""
    loss = objective.total(logps, entropies)
    if nll_weights is not None:
        loss = loss - (nll_weights * torch.where(nll_weights != 0, logps, 0.0)).sum()
    counted = objective.measured.mask & entropies.isfinite()
    entropy_sum = torch.where(counted, entropies, 0.0).detach().sum(dtype=torch.float64)
    return loss, logps.detach(), torch.cat([objective.statistics(logps), entropy_sum[None]])


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor in `dtype`, multiplied before it is rounded, without a copy in a wider type.

    Args:
        gradient: any shape, of `dtype` or wider.
        factor: one number, on the same device.
    """
    if takes_triton(gradient):
        from rethinker_kernels.triton_kernels.linear_loss import scaled

        return scaled(gradient, factor, dtype)
    out = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    for part in slices(0, gradient.numel(), CPU_LOGITS_BYTES // 4):
        torch.mul(gradient.reshape(-1)[part], factor.to(wide(gradient)), out=out.view(-1)[part])
    return out
