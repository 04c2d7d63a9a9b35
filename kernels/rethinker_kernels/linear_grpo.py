"""linear_grpo_loss: from hidden states to the loss and its gradients in one pass over chunks of rows.

Legend: R rows (response tokens), C rows of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rethinker_kernels import linear, reference, torch_rows
from rethinker_kernels.arguments import (
    Surrogate,
    check_grpo,
    check_index,
    check_linear,
    check_temperature,
    check_vector,
)
from rethinker_kernels.devices import takes_exponentials, takes_triton
from rethinker_kernels.linear import Gradients, at, fake_gradients, logits_of
from rethinker_kernels.log_softmax import split_temperature
from rethinker_kernels.reference import LINEAR_GRPO_STATS, wide
from rethinker_kernels.scaled import scaled
from rethinker_kernels.surrogate import grpo_loss, split_normalizer


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    cu_seqlens: Tensor | None = None,
    ref_logps: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    kl_estimator: Literal["k1", "k2", "k3"] = "k3",
    importance: Literal["token", "sequence"] = "token",
    aggregation: Literal["token", "sequence", "constant"] = "token",
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    nll_weights: Tensor | None = None,
    normalizer: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """GRPO's loss straight from hidden states and the head's weight, with an optional supervised term.

        logps = linear_selective_log_softmax(hidden, weight, index, bias=bias, temperature=temperature)
        loss, stats = grpo_loss(logps, old_logps, advantages, ..., normalizer=normalizer)
        loss = loss - (nll_weights * logps).sum()

    The logits [R, V] are never held whole. All that decides a token's gradient is known before the forward pass, so
    the gradients of hidden, weight and bias are made in it: 3 matrix products, where recomputing the logits would
    take 4 (`importance="sequence"` needs all log-probs first, and takes 4). The backward pass only scales them.

    Args: those of the two functions, and
        nll_weights: [R] floating, or None. A token's counts whether or not `mask` leaves it out of the surrogate; the
            normalizer does not apply to it.

    Returns:
        loss: scalar, differentiable (once) in hidden, weight and bias.
        logps: [R], detached.
        stats: [len(LINEAR_GRPO_STATS)] fp64, named by LINEAR_GRPO_STATS, detached.

    Raises:
        ValueError: a shape, type, device or option that does not fit, naming it.
    """
    check_linear(hidden, weight, bias)
    check_index(index, hidden.shape[:1], hidden.device)
    temperatures, temperature = split_temperature(check_temperature(temperature, index))
    surrogate = Surrogate(clip_low, clip_high, dual_clip, kl_coef, kl_estimator, importance, aggregation)
    tensors = {"cu_seqlens": cu_seqlens, "ref_logps": ref_logps, "weights": weights, "mask": mask}
    # The log-probs do not exist yet; a column of the hidden states has their shape and device.
    rows = hidden.detach()[:, :1].reshape(-1)
    check_grpo(rows, old_logps, advantages, surrogate, **tensors, normalizer=normalizer)
    if nll_weights is not None:
        check_vector("nll_weights", nll_weights, rows.shape, rows.device)
    learns = torch.is_grad_enabled()
    loss, logps, stats, *_ = _grpo(
        hidden,
        weight,
        bias,
        index,
        temperatures,
        temperature,
        old_logps,
        advantages,
        **tensors,
        nll_weights=nll_weights,
        **split_normalizer(normalizer),
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        importance=importance,
        aggregation=aggregation,
        needs_hidden=learns and hidden.requires_grad,
        needs_weight=learns and weight.requires_grad,
        needs_bias=learns and bias is not None and bias.requires_grad,
    )
    return loss, logps, stats


@torch.library.custom_op("rethinker::linear_grpo_loss", mutates_args=())
def _grpo(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    old_logps: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor | None,
    ref_logps: Tensor | None,
    weights: Tensor | None,
    mask: Tensor | None,
    nll_weights: Tensor | None,
    normalizers: Tensor | None,
    normalizer: float,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    kl_coef: float,
    kl_estimator: str,
    importance: str,
    aggregation: str,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, logps, stats, gradients of hidden, weight and bias as `Gradients.wide` has them)."""
    needs = (needs_hidden, needs_weight, needs_bias)
    surrogate = Surrogate(clip_low, clip_high, dual_clip, kl_coef, kl_estimator, importance, aggregation)
    given = (hidden, weight, bias, index, temperatures, temperature)
    terms = _Terms(hidden, old_logps, advantages, cu_seqlens, ref_logps, weights, mask, nll_weights, aggregation)
    terms.factors /= normalizer if normalizers is None else normalizers
    if not any(needs):
        logps, entropies, _ = linear.log_softmax_op(*given, True)
        gradients = Gradients(hidden, weight, bias, needs)
    elif importance == "token":
        logps, entropies, gradients = _one_pass(*given, terms, needs, surrogate)
    else:
        logps, entropies, saved = linear.log_softmax_op(*given, True)
        slopes = terms.slopes(slice(None), logps, surrogate)
        gradients = linear.log_softmax_gradients(*given, saved, entropies, slopes, None, needs)

    with torch.no_grad():
        loss, stats = grpo_loss(
            logps,
            old_logps,
            advantages,
            cu_seqlens=cu_seqlens,
            ref_logps=ref_logps,
            weights=weights,
            mask=mask,
            normalizer=normalizer if normalizers is None else normalizers,
            **vars(surrogate),
        )
        if terms.nll_weights is not None:
            loss = loss - torch.where(terms.nll_weights != 0, terms.nll_weights * logps, 0.0).sum()
        counts = terms.active & entropies.isfinite()
        entropy_sum = torch.where(counts, entropies, 0.0).sum(dtype=torch.float64)
    return loss, logps, torch.cat([stats, entropy_sum[None]]), *gradients.wide()


class _Terms:
    """What the surrogate needs per row, [R] each."""

    def __init__(
        self,
        hidden: Tensor,
        old_logps: Tensor,
        advantages: Tensor,
        cu_seqlens: Tensor | None,
        ref_logps: Tensor | None,
        weights: Tensor | None,
        mask: Tensor | None,
        nll_weights: Tensor | None,
        aggregation: str,
    ) -> None:
        dtype, rows = wide(hidden), hidden[:, :1].reshape(-1)
        sequence = None if cu_seqlens is None else reference.sequence_of_row(cu_seqlens, rows)
        self.sequence, self.cu_seqlens = sequence, cu_seqlens
        self.old_logps, self.ref_logps = old_logps.contiguous(), None if ref_logps is None else ref_logps.contiguous()
        self.advantages = reference.per_row("advantages", advantages, cu_seqlens, sequence, rows).to(dtype).contiguous()
        self.active = reference.active_rows(rows, cu_seqlens, sequence, weights, mask)  # bool
        self.factors = self.active.to(dtype)
        self.nll_weights = None if nll_weights is None else nll_weights.to(dtype).contiguous()
        if weights is not None:
            per_row = reference.per_row("weights", weights, cu_seqlens, sequence, rows).to(dtype)
            self.factors = torch.where(self.active, per_row, 0.0)
        if aggregation == "sequence":
            tokens = reference.segment_sum(self.active.to(dtype), sequence, cu_seqlens[1:])
            self.factors = self.factors / tokens.clamp(min=1)[sequence]

    def slopes(self, rows: slice, logps: Tensor, surrogate: Surrogate) -> Tensor:
        """d loss / d logps of these rows."""
        slopes = torch_rows.loss_gradient(
            logps,
            self.old_logps[rows],
            self.advantages[rows],
            self.factors[rows],
            self.active[rows],
            at(self.ref_logps, rows),
            self.sequence,
            self.cu_seqlens,
            surrogate,
        )
        return slopes if self.nll_weights is None else slopes - self.nll_weights[rows]


def _one_pass(hidden, weight, bias, index, temperatures, temperature, terms, needs, surrogate):
    """Log-probs, entropies and gradients, each row's logits computed once (importance="token")."""
    logps = hidden.new_empty(hidden.shape[0], dtype=wide(hidden))
    entropies = torch.empty_like(logps)

    def fill_exponentials(rows: slice, out: Tensor) -> Tensor:
        from rethinker_kernels.triton_kernels.exponentials import Exponentials

        e = Exponentials(hidden[rows], weight, index[rows], temperature, out)
        logps[rows], entropies[rows], _ = e.measure(terms.old_logps[rows], True)
        return e.close(terms.slopes(rows, logps[rows], surrogate))

    def fill(rows: slice, out: Tensor) -> None:
        for here, logits, into in logits_of(hidden, weight, bias, rows, out):
            chosen = (index[here], at(temperatures, here), temperature)
            if takes_triton(hidden):
                from rethinker_kernels.triton_kernels.linear import grpo_rows

                logps[here], entropies[here] = grpo_rows(
                    logits,
                    *chosen,
                    terms.old_logps[here],
                    terms.advantages[here],
                    terms.factors[here],
                    at(terms.ref_logps, here),
                    at(terms.nll_weights, here),
                    surrogate,
                    out=into,
                )
            else:
                logps[here], entropies[here], saved = torch_rows.forward_rows(logits, *chosen, True)
                slopes = terms.slopes(here, logps[here], surrogate)
                torch_rows.gradient_rows(logits, *chosen, saved, None, slopes, None, out=into)

    gradients = Gradients(hidden, weight, bias, needs)
    fused = takes_exponentials(hidden, weight, bias, temperatures, temperature)
    gradients.accumulate(fill_exponentials if fused else fill)
    return logps, entropies, gradients


@_grpo.register_fake
def _(hidden, weight, bias, *rest):
    return (
        hidden.new_empty((), dtype=wide(hidden)),
        hidden.new_empty(hidden.shape[0], dtype=wide(hidden)),
        hidden.new_empty(len(LINEAR_GRPO_STATS), dtype=torch.float64),
        *fake_gradients((hidden, weight, bias), rest[-3:], (hidden.dtype, wide(weight), wide(weight))),
    )


def _setup_grpo(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # or zeros would be made for the outputs without one, the gradients among them
    _, logps, stats, *gradients = output
    ctx.mark_non_differentiable(logps, stats, *gradients)
    ctx.save_for_backward(*gradients)
    ctx.needs, ctx.dtype, ctx.others = inputs[-3:], inputs[0].dtype, len(inputs) - 3


def _gradient_grpo(ctx, grad_loss, *_):
    if grad_loss is None:
        return (None,) * (len(ctx.needs) + ctx.others)
    given = zip(ctx.saved_tensors, ctx.needs, strict=True)
    return *(scaled(g, grad_loss, ctx.dtype) if need else None for g, need in given), *(None,) * ctx.others


_grpo.register_autograd(_gradient_grpo, setup_context=_setup_grpo)
