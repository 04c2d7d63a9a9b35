"""linear_policy_loss: from hidden states to any loss and its gradients in one pass over chunks of rows.

Legend: R rows (response tokens), C rows of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rethinker_kernels import linear, reference
from rethinker_kernels.arguments import check_index, check_linear, check_temperature, check_vector, wide
from rethinker_kernels.devices import takes_triton
from rethinker_kernels.linear import Gradients, Head, at
from rethinker_kernels.log_softmax import row_kernels, split_temperature
from rethinker_kernels.losses import Loss, Objective, split_options
from rethinker_kernels.scaled import scaled


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    loss: Loss,
    old_logps: Tensor,
    advantages: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    nll_weights: Tensor | None = None,
    **given,
) -> tuple[Tensor, Tensor, Tensor]:
    """Any loss on log-probs straight from hidden states and the head's weight, with an optional supervised term.

        logps = linear_selective_log_softmax(hidden, weight, index, bias=bias, temperature=temperature)
        loss, stats = policy_loss(logps, loss, old_logps, advantages, ..., normalizer=normalizer)
        loss = loss - (nll_weights * logps).sum()

    The logits [R, V] are never held whole. All that decides a token's gradient is known before the forward pass, so the
    gradients of hidden, weight and bias are made in it: per chunk the log-probs, the loss's slope by autograd on a
    vector [C], and the logits turned into their gradient. That is 3 matrix products, where recomputing the logits would
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
    check_linear(hidden, weight, bias)
    check_index(index, hidden.shape[:1], hidden.device)
    check_temperature(temperature, index)
    # The log-probs do not exist yet; a column of the hidden states has their shape and device.
    rows = hidden.detach()[:, :1].reshape(-1)
    if nll_weights is not None:
        check_vector("nll_weights", nll_weights, rows.shape, rows.device)
    if torch.compiler.is_compiling():
        given |= {"bias": bias, "temperature": temperature, "nll_weights": nll_weights}
        log_softmax = linear.linear_selective_log_softmax
        return reference.composed_loss(log_softmax, hidden, weight, index, loss, old_logps, advantages, **given)
    objective = Objective(loss, rows, old_logps, advantages, **given)
    learns = torch.is_grad_enabled()
    needs = tuple(learns and x is not None and x.requires_grad for x in (hidden, weight, bias))
    return _LinearPolicyLoss.apply(hidden, weight, bias, index, temperature, objective, nll_weights, needs)


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
    def forward(ctx, hidden, weight, bias, index, temperature, objective, nll_weights, needs):
        head = Head(hidden, weight, bias, index, *split_temperature(check_temperature(temperature, index)))
        nll_weights = None if nll_weights is None else nll_weights.detach().to(wide(hidden)).contiguous()
        if any(needs) and not objective.whole_sequences:
            logps, entropies, gradients = one_pass(head, objective, nll_weights, needs)
        else:
            logps, entropies, saved = linear.log_softmax_op(*head, True)
            gradients = Gradients(head, needs)
            if any(needs):
                slopes = _slopes(objective, nll_weights, slice(None), logps)
                gradients.accumulate_log_softmax(saved, entropies, slopes, None)
        loss = objective.total(logps)
        if nll_weights is not None:
            loss = loss - torch.where(nll_weights != 0, nll_weights * logps, 0.0).sum()
        stats = torch.cat([objective.statistics(logps), reference.entropy_sum(entropies, objective.rows.mask)])
        ctx.set_materialize_grads(False)  # or zeros would be made for the outputs without one
        ctx.mark_non_differentiable(logps, stats)
        ctx.save_for_backward(*gradients.wide())
        ctx.needs, ctx.dtype = needs, hidden.dtype
        return loss, logps, stats

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            return (None,) * 8
        given = zip(ctx.saved_tensors, ctx.needs, strict=True)
        return *(scaled(g, grad_loss, ctx.dtype) if need else None for g, need in given), *(None,) * 5


def _slopes(objective: Objective, nll_weights: Tensor | None, rows: slice, logps: Tensor) -> Tensor:
    """d loss / d logps [C] of these rows, the supervised term included."""
    slopes = objective.slopes(logps, rows)
    return slopes if nll_weights is None else slopes - nll_weights[rows]


def one_pass(
    head: Head, objective: Objective, nll_weights: Tensor | None, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Gradients]:
    """Log-probs [R], entropies [R] and gradients, each row's logits computed once."""
    hidden, kernels = head.hidden, row_kernels(head.hidden)
    logps = hidden.new_empty(hidden.shape[0], dtype=wide(hidden))
    entropies = torch.empty_like(logps)

    def fill_exponentials(rows: slice, out: Tensor) -> Tensor:
        e = head.exponentials(rows, out)
        logps[rows], entropies[rows], _ = e.measure(objective.rows.old_logps[rows], True)
        return e.close(_slopes(objective, nll_weights, rows, logps[rows]))

    def fill_grpo(rows: slice, out: Tensor) -> None:
        from rethinker_kernels.triton_kernels.linear_loss import grpo_rows

        for here, logits, into in head.logits(rows, out):
            known = (objective.rows.at(here), objective.factors[here], at(nll_weights, here), objective.surrogate)
            logps[here], entropies[here] = grpo_rows(logits, *head.chosen(here), *known, out=into)

    def fill(rows: slice, out: Tensor) -> None:
        for here, logits, into in head.logits(rows, out):
            chosen = head.chosen(here)
            logps[here], entropies[here], saved = kernels.forward_rows(logits, *chosen, True)
            slopes = _slopes(objective, nll_weights, here, logps[here])
            kernels.gradient_rows(logits, *chosen, saved, None, slopes, None, out=into)

    gradients = Gradients(head, needs)
    if head.takes_exponentials:
        gradients.accumulate(fill_exponentials)
    else:
        gradients.accumulate(fill_grpo if objective.is_grpo and takes_triton(hidden) else fill)
    return logps, entropies, gradients
