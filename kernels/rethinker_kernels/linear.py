"""The ops that start from hidden states: logits exist for a chunk of rows at a time and become their own gradient.

Legend: R rows (response tokens), C rows of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rethinker_kernels import reference, torch_rows
from rethinker_kernels.arguments import check_grpo, check_index, check_linear, check_temperature
from rethinker_kernels.devices import row_kernels, takes_triton
from rethinker_kernels.log_softmax import split_temperature
from rethinker_kernels.reference import LINEAR_GRPO_STATS, wide
from rethinker_kernels.surrogate import grpo_loss, split_normalizer

CHUNK_BYTES = {"cuda": 1280 * 2**20, "cpu": 64 * 2**20}
"""Size of a chunk's logits. On a GPU 4,096 rows of a bf16 vocabulary of 152,064: enough for matrix products at full
speed, and for few passes over the weight's gradient."""

MULTIPLE = {"cuda": 128, "cpu": 1}
"""A chunk's rows are a multiple of this: a tile of the matrix product."""


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

    The logits [R, V] are never held whole, only those of a chunk of rows (CHUNK_BYTES); the backward pass computes
    them again. The weight's gradient is accumulated in fp32. An input that needs no gradient (a frozen head) costs
    nothing in the backward pass.

    Args:
        hidden: [R, D] floating.
        weight: [V, D], the head, of the same type.
        index: [R] int64, as in `selective_log_softmax`.
        bias: [V] of the same type, or None.
        temperature: a float, or a tensor [R], as in `selective_log_softmax`.
        return_entropy: also return the entropy, in nats.

    Returns:
        logps [R], and entropy [R] if asked; fp32 (fp64 for fp64 inputs). Differentiable (once) in hidden, weight, bias.

    Raises:
        ValueError: a shape, type or device that does not fit, or a temperature below 0.
    """
    check_linear(hidden, weight, bias)
    check_index(index, hidden.shape[:1], hidden.device)
    temperatures, temperature = split_temperature(check_temperature(temperature, index))
    logps, entropies, _ = _log_softmax(hidden, weight, bias, index, temperatures, temperature, return_entropy)
    return (logps, entropies) if return_entropy else logps


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
    normalizer: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """GRPO's loss straight from hidden states and the head's weight.

        logps = linear_selective_log_softmax(hidden, weight, index, bias=bias, temperature=temperature)
        loss, stats = grpo_loss(logps, old_logps, advantages, ..., normalizer=normalizer)

    The logits [R, V] are never held whole. All that decides a token's gradient is known before the forward pass, so
    the gradients of hidden, weight and bias are made in it: 3 matrix products, where recomputing the logits would
    take 4 (`importance="sequence"` needs all log-probs first, and takes 4). The backward pass only scales them.

    Args: those of the two functions.

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
    check_grpo(
        hidden.new_empty(0).expand(0) if hidden.shape[0] == 0 else hidden.detach()[:, 0],
        old_logps,
        advantages,
        cu_seqlens=cu_seqlens,
        ref_logps=ref_logps,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        importance=importance,
        aggregation=aggregation,
        weights=weights,
        mask=mask,
        normalizer=normalizer,
    )
    normalizers, normalizer = split_normalizer(normalizer)
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
        cu_seqlens,
        ref_logps,
        weights,
        mask,
        normalizers,
        normalizer,
        clip_low,
        clip_high,
        dual_clip,
        kl_coef,
        kl_estimator,
        importance,
        aggregation,
        learns and hidden.requires_grad,
        learns and weight.requires_grad,
        learns and bias is not None and bias.requires_grad,
    )
    return loss, logps, stats


class _Gradients:
    """Gradients of hidden, weight and bias, chunk by chunk; one that is not needed is [0]."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool]) -> None:
        self.inputs, self.needs = (hidden, weight, bias), needs
        # The weight's gradient is a sum over all rows: it is kept in fp32 until it is complete.
        self.hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if needs[0] else None
        self.weight = torch.zeros(weight.shape, dtype=wide(weight), device=weight.device) if needs[1] else None
        self.bias = torch.zeros(bias.shape, dtype=wide(weight), device=weight.device) if needs[2] else None

    def add(self, rows: slice, grad_logits: Tensor) -> None:
        """Take in the gradient [C, V] of a chunk's logits."""
        hidden, weight, _ = self.inputs
        if self.needs[0]:
            torch.mm(grad_logits, weight, out=self.hidden[rows])
        if self.needs[1]:
            _add_product(self.weight, grad_logits.t(), hidden[rows])
        if self.needs[2]:
            self.bias += grad_logits.sum(0, dtype=self.bias.dtype)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        hidden, weight, bias = self.inputs
        none = hidden.new_empty
        return (
            self.hidden if self.needs[0] else none(0),
            self.weight.to(weight.dtype) if self.needs[1] else none(0),
            self.bias.to(bias.dtype) if self.needs[2] else none(0),
        )


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b; total is fp32 also where a and b are of 16 bits."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _chunks_of_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None):
    """(rows, their logits [C, V]) for all rows; the logits may be overwritten, and are by the next chunk."""
    kind = "cuda" if hidden.is_cuda else "cpu"
    vocabulary = weight.shape[0]
    row_bytes = vocabulary * weight.element_size()
    chunks = torch_rows.chunks(hidden.shape[0], row_bytes, CHUNK_BYTES[kind], MULTIPLE[kind])
    buffer = hidden.new_empty(max((c.stop - c.start for c in chunks), default=0), vocabulary)
    for rows in chunks:
        logits = buffer[: rows.stop - rows.start]
        if bias is None:
            torch.mm(hidden[rows], weight.t(), out=logits)
        else:
            torch.addmm(bias, hidden[rows], weight.t(), out=logits)
        yield rows, logits


def _at(values: Tensor | None, rows: slice) -> Tensor | None:
    return None if values is None else values[rows]


@torch.library.custom_op("rethinker::linear_selective_log_softmax", mutates_args=())
def _log_softmax(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    return_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs [R], entropies [R] ([0] if not asked for) and what the backward pass needs [2, R]."""
    kernels = row_kernels(hidden)
    rows = hidden.shape[0]
    logps = hidden.new_empty(rows, dtype=wide(hidden))
    entropies = logps.new_empty(rows if return_entropy else 0)
    saved = logps.new_empty(2, rows)
    for here, logits in _chunks_of_logits(hidden, weight, bias):
        logps[here], entropy, saved[:, here] = kernels.forward_rows(
            logits, index[here], _at(temperatures, here), temperature, return_entropy
        )
        if return_entropy:
            entropies[here] = entropy
    return logps, entropies, saved


@_log_softmax.register_fake
def _(hidden, weight, bias, index, temperatures, temperature, return_entropy):
    rows = hidden.shape[0]
    like = hidden.new_empty(rows, dtype=wide(hidden))
    return like, like.new_empty(rows if return_entropy else 0), like.new_empty(2, rows)


@torch.library.custom_op("rethinker::linear_selective_log_softmax_backward", mutates_args=())
def _log_softmax_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    saved: Tensor,
    entropies: Tensor,
    grad_logps: Tensor | None,
    grad_entropies: Tensor | None,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _Gradients(hidden, weight, bias, (needs_hidden, needs_weight, needs_bias))
    if grad_logps is None and grad_entropies is None:
        return gradients.result()
    kernels = row_kernels(hidden)
    for here, logits in _chunks_of_logits(hidden, weight, bias):
        kernels.gradient_rows(
            logits,
            index[here],
            _at(temperatures, here),
            temperature,
            saved[:, here].contiguous(),
            entropies[here] if grad_entropies is not None else None,
            _at(grad_logps, here),
            _at(grad_entropies, here),
            out=logits,
        )
        gradients.add(here, logits)
    return gradients.result()


@_log_softmax_backward.register_fake
def _(hidden, weight, bias, *rest):
    return _fake_gradients(hidden, weight, bias, rest[-3:])


def _fake_gradients(hidden, weight, bias, needs):
    return tuple(
        x.new_empty(x.shape) if need else hidden.new_empty(0)
        for x, need in zip((hidden, weight, bias), needs, strict=True)
    )


def _setup_log_softmax(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # an output that is not used gives None, and its work is left out
    hidden, weight, bias, index, temperatures, ctx.temperature, _ = inputs
    _, entropies, saved = output
    ctx.save_for_backward(hidden, weight, bias, index, temperatures, saved, entropies)


def _gradient_log_softmax(ctx, grad_logps, grad_entropies, _):
    hidden, weight, bias, index, temperatures, saved, entropies = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    gradients = _log_softmax_backward(
        hidden, weight, bias, index, temperatures, ctx.temperature, saved, entropies, grad_logps, grad_entropies, *needs
    )
    return (*(g if need else None for g, need in zip(gradients, needs, strict=True)), *(None,) * 4)


_log_softmax.register_autograd(_gradient_log_softmax, setup_context=_setup_log_softmax)


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
    """(loss, logps, stats, gradients of hidden, weight and bias); a gradient that is not needed is [0]."""
    needs = (needs_hidden, needs_weight, needs_bias)
    surrogate = {
        "clip_low": clip_low,
        "clip_high": clip_high,
        "dual_clip": dual_clip,
        "kl_coef": kl_coef,
        "kl_estimator": kl_estimator,
    }
    given = (hidden, weight, bias, index, temperatures, temperature)
    terms = _Terms(hidden, old_logps, advantages, cu_seqlens, ref_logps, weights, mask, aggregation)
    terms.factors /= normalizer if normalizers is None else normalizers
    if not any(needs):
        logps, entropies, _ = _log_softmax(*given, True)
        gradients = _Gradients(hidden, weight, bias, needs).result()
    elif importance == "token":
        logps, entropies, gradients = _one_pass(*given, terms, needs, surrogate)
    else:
        logps, entropies, saved = _log_softmax(*given, True)
        slopes = terms.slopes(slice(None), logps, importance=importance, **surrogate)
        gradients = _log_softmax_backward(*given, saved, entropies, slopes, None, *needs)

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
            importance=importance,
            aggregation=aggregation,
            **surrogate,
        )
        counts = terms.active & entropies.isfinite()
        entropy_sum = torch.where(counts, entropies, 0.0).sum(dtype=torch.float64)
    return loss, logps, torch.cat([stats, entropy_sum[None]]), *gradients


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
        aggregation: str,
    ) -> None:
        dtype, rows = wide(hidden), hidden[:, :1].reshape(-1)
        sequence = None if cu_seqlens is None else reference.sequence_of_row(cu_seqlens, rows)
        self.sequence, self.cu_seqlens = sequence, cu_seqlens
        self.old_logps, self.ref_logps = old_logps.contiguous(), None if ref_logps is None else ref_logps.contiguous()
        self.advantages = reference.per_row("advantages", advantages, cu_seqlens, sequence, rows).to(dtype).contiguous()
        self.active = reference.active_rows(rows, cu_seqlens, sequence, weights, mask)  # bool
        self.factors = self.active.to(dtype)
        if weights is not None:
            per_row = reference.per_row("weights", weights, cu_seqlens, sequence, rows).to(dtype)
            self.factors = torch.where(self.active, per_row, 0.0)
        if aggregation == "sequence":
            tokens = reference.segment_sum(self.active.to(dtype), sequence, cu_seqlens[1:])
            self.factors = self.factors / tokens.clamp(min=1)[sequence]

    def slopes(self, rows: slice, logps: Tensor, **options) -> Tensor:
        """d loss / d logps of these rows."""
        return torch_rows.loss_gradient(
            logps,
            self.old_logps[rows],
            self.advantages[rows],
            self.factors[rows],
            self.active[rows],
            _at(self.ref_logps, rows),
            self.sequence,
            self.cu_seqlens,
            **options,
        )


def _one_pass(hidden, weight, bias, index, temperatures, temperature, terms, needs, surrogate):
    """Log-probs, entropies and gradients, each chunk's logits computed once."""
    logps = hidden.new_empty(hidden.shape[0], dtype=wide(hidden))
    entropies = torch.empty_like(logps)
    gradients = _Gradients(hidden, weight, bias, needs)
    for here, logits in _chunks_of_logits(hidden, weight, bias):
        chosen = (index[here], _at(temperatures, here), temperature)
        if takes_triton(hidden):
            from rethinker_kernels.triton_kernels.linear import grpo_rows_

            logps[here], entropies[here] = grpo_rows_(
                logits,
                *chosen,
                terms.old_logps[here],
                terms.advantages[here],
                terms.factors[here],
                _at(terms.ref_logps, here),
                **surrogate,
            )
        else:
            logps[here], entropies[here], saved = torch_rows.forward_rows(logits, *chosen, True)
            slopes = terms.slopes(here, logps[here], importance="token", **surrogate)
            torch_rows.gradient_rows(logits, *chosen, saved, None, slopes, None, out=logits)
        gradients.add(here, logits)
    return logps, entropies, gradients.result()


@_grpo.register_fake
def _(hidden, weight, bias, *rest):
    return (
        hidden.new_empty((), dtype=wide(hidden)),
        hidden.new_empty(hidden.shape[0], dtype=wide(hidden)),
        hidden.new_empty(len(LINEAR_GRPO_STATS), dtype=torch.float64),
        *_fake_gradients(hidden, weight, bias, rest[-3:]),
    )


def _setup_grpo(ctx, inputs, output) -> None:
    _, logps, stats, *gradients = output
    ctx.mark_non_differentiable(logps, stats, *gradients)
    ctx.save_for_backward(*gradients)
    ctx.needs, ctx.others = inputs[-3:], len(inputs) - 3


def _gradient_grpo(ctx, grad_loss, *_):
    scaled = (g * grad_loss.to(g.dtype) if need else None for g, need in zip(ctx.saved_tensors, ctx.needs, strict=True))
    return (*scaled, *(None,) * ctx.others)


_grpo.register_autograd(_gradient_grpo, setup_context=_setup_grpo)
