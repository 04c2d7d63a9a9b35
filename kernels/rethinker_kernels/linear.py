"""linear_selective_log_softmax: logits exist for a chunk of rows at a time, and become their own gradient.

Legend: R rows (response tokens), C rows of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rethinker_kernels import torch_rows
from rethinker_kernels.arguments import check_index, check_linear, check_temperature
from rethinker_kernels.devices import row_kernels
from rethinker_kernels.log_softmax import split_temperature
from rethinker_kernels.reference import wide

CHUNK_BYTES = {"cuda": 832 * 2**20, "cpu": 64 * 2**20}
"""Size of a chunk's logits. On a GPU 2,816 rows of a bf16 vocabulary of 152,064: enough for matrix products at full
speed and for few passes over the weight's gradient, and no more than that gradient takes when it is narrowed."""

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
    logps, entropies, _ = log_softmax_op(hidden, weight, bias, index, temperatures, temperature, return_entropy)
    return (logps, entropies) if return_entropy else logps


class Gradients:
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


def chunks_of_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None):
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


def at(values: Tensor | None, rows: slice) -> Tensor | None:
    return None if values is None else values[rows]


@torch.library.custom_op("rethinker::linear_selective_log_softmax", mutates_args=())
def log_softmax_op(
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
    for here, logits in chunks_of_logits(hidden, weight, bias):
        logps[here], entropy, saved[:, here] = kernels.forward_rows(
            logits, index[here], at(temperatures, here), temperature, return_entropy
        )
        if return_entropy:
            entropies[here] = entropy
    return logps, entropies, saved


@log_softmax_op.register_fake
def _(hidden, weight, bias, index, temperatures, temperature, return_entropy):
    rows = hidden.shape[0]
    like = hidden.new_empty(rows, dtype=wide(hidden))
    return like, like.new_empty(rows if return_entropy else 0), like.new_empty(2, rows)


@torch.library.custom_op("rethinker::linear_selective_log_softmax_backward", mutates_args=())
def log_softmax_backward_op(
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
    gradients = Gradients(hidden, weight, bias, (needs_hidden, needs_weight, needs_bias))
    if grad_logps is None and grad_entropies is None:
        return gradients.result()
    kernels = row_kernels(hidden)
    for here, logits in chunks_of_logits(hidden, weight, bias):
        kernels.gradient_rows(
            logits,
            index[here],
            at(temperatures, here),
            temperature,
            saved[:, here].contiguous(),
            entropies[here] if grad_entropies is not None else None,
            at(grad_logps, here),
            at(grad_entropies, here),
            out=logits,
        )
        gradients.add(here, logits)
        del logits  # the chunk's buffer is free before the weight's gradient is narrowed
    return gradients.result()


@log_softmax_backward_op.register_fake
def _(hidden, weight, bias, *rest):
    return fake_gradients(hidden, weight, bias, rest[-3:])


def fake_gradients(hidden, weight, bias, needs):
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
    gradients = log_softmax_backward_op(
        hidden, weight, bias, index, temperatures, ctx.temperature, saved, entropies, grad_logps, grad_entropies, *needs
    )
    return (*(g if need else None for g, need in zip(gradients, needs, strict=True)), *(None,) * 4)


log_softmax_op.register_autograd(_gradient_log_softmax, setup_context=_setup_log_softmax)
