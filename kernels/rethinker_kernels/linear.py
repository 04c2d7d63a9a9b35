"""linear_selective_log_softmax: logits exist for a chunk of rows at a time, in fp32, and again for their gradient.

Legend: R rows (response tokens), C rows of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rethinker_kernels.arguments import check_linear, check_softcap, check_temperature, wide
from rethinker_kernels.chunks import CPU_LOGITS_BYTES, chunk_rows, slices
from rethinker_kernels.devices import processors, takes_exponentials
from rethinker_kernels.log_softmax import row_kernels

if TYPE_CHECKING:
    from rethinker_kernels.triton_kernels.exponentials import Exponentials


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
    """Log-probability of one chosen token per hidden state, and the entropy.

        logits = hidden @ weight.T + bias
        logps, entropy = selective_log_softmax(logits, index, temperature=temperature, softcap=softcap, ...)

    The logits [R, V] are never held whole, only those of a chunk of rows, and in fp32 also where the inputs are of 16
    bits: rounded to bf16 they would move a log-prob by 0.01. The backward pass computes them again. The weight's
    gradient is accumulated in fp32. An input that needs no gradient (a frozen head) costs nothing in the backward pass.

    Args:
        hidden: [R, D] floating.
        weight: [V, D], the head, of the same type.
        index: [R] int64, as in `selective_log_softmax`.
        bias: [V] of the same type, or None.
        temperature: as in `selective_log_softmax`.
        return_entropy: also return the entropy, in nats.
        softcap: as in `selective_log_softmax`.

    Returns:
        logps [R], and entropy [R] if asked; fp32 (fp64 for fp64 inputs). Differentiable (once) in hidden, weight, bias.

    Raises:
        ValueError: a shape, type or device that does not fit, a temperature below 0, or a softcap not above 0.
    """
    check_linear(hidden, weight, bias, index)
    head = Head(hidden, weight, bias, index, check_temperature(temperature), check_softcap(softcap))
    logps, entropies, _ = log_softmax_op(*head, return_entropy)
    return (logps, entropies) if return_entropy else logps


class Head(NamedTuple):
    """What makes log-probs of chosen tokens, as torch ops take it; arguments of `linear_selective_log_softmax`."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    index: Tensor
    temperature: float
    softcap: float | None = None

    @property
    def chunks(self) -> tuple[int, int]:
        """`chunk_rows` of these tensors on their device."""
        hidden = self.hidden
        return chunk_rows(hidden.shape[0], *self.weight.shape[::-1], hidden.element_size(), processors(hidden.device))

    def parts(
        self, rows: slice, out: Tensor | None, exponentials: bool = True
    ) -> Iterator[tuple[slice, Logits | Exponentials]]:
        """(part of the rows, its logits or exponentials) for all `rows`; a part may overwrite the one before.

        Args:
            out: [C, V] for the gradient of these rows' logits, if it is wanted: a chunk of exponentials is one part.
            exponentials: whether they will do, where the device has them: not for the gradient of entropies.
        """
        hidden, weight, bias = self.hidden, self.weight, self.bias
        size, chunk = self.chunks
        # They are taken inside the product, of logits as they come: a cap has none.
        if exponentials and self.softcap is None and takes_exponentials(hidden, weight, bias, self.temperature):
            from rethinker_kernels.triton_kernels.exponentials import Exponentials

            for part in slices(rows.start, rows.stop, chunk):
                yield part, Exponentials(hidden[part], weight, self.index[part], self.temperature, out)
            return
        in_place = out is not None and out.dtype == wide(hidden)
        shape = (0 if in_place else min(size, rows.stop - rows.start), weight.shape[0])
        buffer = hidden.new_empty(shape, dtype=wide(hidden))
        for part in slices(rows.start, rows.stop, size):
            into = None if out is None else out[part.start - rows.start : part.stop - rows.start]
            logits = into if in_place else buffer[: part.stop - part.start]
            if bias is not None:
                logits.copy_(bias)
            product(hidden[part], weight.t(), out=logits, add=bias is not None)
            yield part, Logits(self, part, logits, into)


class Logits:
    """Some rows' logits in fp32 (or fp64), and what the row kernels make of them; used as `Exponentials` are."""

    def __init__(self, head: Head, rows: slice, logits: Tensor, out: Tensor | None) -> None:
        self.logits, self.out = logits, out  # [B, V]; `out` may be the logits themselves
        self.chosen, self.softcap = (head.index[rows], head.temperature), head.softcap

    def measure(self, _: Tensor, return_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs [B], entropies [B] ([0] if not asked for) and what a backward pass needs [2, B]."""
        found = row_kernels(self.logits).forward_rows(self.logits, *self.chosen, return_entropy, self.softcap)
        self.saved = found[2]
        return found

    def repeat(self, saved: Tensor) -> None:
        """Go on from what `measure` returned of the same rows."""
        self.saved = saved.contiguous()

    def close(
        self, grad_logps: Tensor | None, entropies: Tensor | None = None, grad_entropies: Tensor | None = None
    ) -> None:
        """Make `out` the gradient of the logits, from those of log-probs and entropies [B]."""
        of_rows = *self.chosen, self.saved, entropies, grad_logps, grad_entropies, self.softcap
        row_kernels(self.logits).gradient_rows(self.logits, *of_rows, out=self.out)


class Gradients:
    """Gradients of hidden, weight and bias, a chunk of rows at a time; one that is not needed is [0].

    Those of weight and bias are sums over all rows, in fp32 (or fp64).
    """

    def __init__(self, head: Head, needs: tuple[bool, bool, bool]) -> None:
        self.head, self.needs = head, needs
        self.hidden = head.hidden.new_empty(head.hidden.shape if needs[0] else 0)
        self.weight = self.bias = None

    def accumulate(
        self, close: Callable[[slice, Logits | Exponentials], Tensor | None], exponentials: bool = True
    ) -> None:
        """Take in all rows: `close(rows, part)` makes a part of the product the gradient of its logits.

        It may leave a factor per row out of them, and return it: fp32 [C].
        """
        hidden, weight = self.head[:2]
        _, size = self.head.chunks
        buffer = hidden.new_empty(min(size, hidden.shape[0]), weight.shape[0])
        for rows in slices(0, hidden.shape[0], size):
            grad_logits = buffer[: rows.stop - rows.start]
            # In an expression, so that no name keeps a part's logits beside those of the next chunk.
            *_, factors = (close(*part) for part in self.head.parts(rows, grad_logits, exponentials))
            self._add(rows, grad_logits, factors)

    def accumulate_log_softmax(
        self, saved: Tensor, entropies: Tensor, grad_logps: Tensor | None, grad_entropies: Tensor | None
    ) -> None:
        """Take in those of log-probs and entropies, whose own gradients [R] may be None.

        Args: `saved` and `entropies` are `log_softmax_op`'s.
        """

        def close(rows: slice, part: Logits | Exponentials) -> Tensor | None:
            part.repeat(saved[:, rows])
            of_entropies = () if grad_entropies is None else (entropies[rows], grad_entropies[rows])
            return part.close(at(grad_logps, rows), *of_entropies)

        self.accumulate(close, exponentials=grad_logps is not None and grad_entropies is None)

    def _add(self, rows: slice, grad_logits: Tensor, factors: Tensor | None) -> None:
        hidden, weight, bias = self.head[:3]
        if self.needs[0] and factors is None:
            torch.mm(grad_logits, weight, out=self.hidden[rows])
        elif self.needs[0]:
            unscaled = torch.empty_like(self.hidden[rows], dtype=wide(hidden))
            product(grad_logits, weight, out=unscaled)
            torch.mul(unscaled, factors[:, None], out=self.hidden[rows])
        if self.needs[1]:
            first = self.weight is None
            if first:
                self.weight = torch.empty(weight.shape, dtype=wide(weight), device=weight.device)
            inputs = hidden[rows]
            if factors is not None:
                inputs = torch.mul(inputs, factors[:, None], out=torch.empty_like(inputs))
            product(grad_logits.t(), inputs, out=self.weight, add=not first)
        if self.needs[2]:
            part = grad_logits.sum(0, dtype=wide(bias))
            self.bias = part if self.bias is None else self.bias.add_(part)

    def wide(self) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden's in its own type, weight's and bias's in fp32 (or fp64)."""
        sums = []
        for x, need, total in zip(self.head[1:3], self.needs[1:], (self.weight, self.bias), strict=True):
            if not need:
                total = self.hidden.new_empty(0)
            sums.append(x.new_zeros(x.shape, dtype=wide(x)) if total is None else total)
        return self.hidden, *sums


def product(a: Tensor, b: Tensor, *, out: Tensor, add: bool = False) -> None:
    """out = a @ b, or out += a @ b; an fp32 `out` of 16-bit a and b is never rounded to 16 bits on the way."""
    if out.dtype == a.dtype:
        if add:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    elif out.is_cuda:
        if add:
            torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
        else:
            torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
    else:  # a CPU has no such product; `a`, a chunk, is widened whole, and the other piece by piece
        a = a.to(out.dtype)
        for piece in slices(0, out.shape[1], max(CPU_LOGITS_BYTES // (4 * b.shape[0]), 1)):
            product(a, b[:, piece].to(out.dtype), out=out[:, piece], add=add)


def at(values: Tensor | None, rows: slice) -> Tensor | None:
    return None if values is None else values[rows]


@torch.library.custom_op("rethinker::linear_selective_log_softmax", mutates_args=())
def log_softmax_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    temperature: float,
    softcap: float | None,
    return_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs [R], entropies [R] ([0] if not asked for) and what the backward pass needs [2, R]."""
    head, rows = Head(hidden, weight, bias, index, temperature, softcap), len(hidden)
    logps = hidden.new_empty(rows, dtype=wide(hidden))
    entropies = logps.new_empty(rows if return_entropy else 0)
    saved = logps.new_empty(2, rows)
    for here, part in head.parts(slice(0, rows), None):
        logps[here], entropy, saved[:, here] = part.measure(None, return_entropy)
        if return_entropy:
            entropies[here] = entropy
    return logps, entropies, saved


@log_softmax_op.register_fake
def _(hidden, weight, bias, index, temperature, softcap, return_entropy):
    rows = hidden.shape[0]
    like = hidden.new_empty(rows, dtype=wide(hidden))
    return like, like.new_empty(rows if return_entropy else 0), like.new_empty(2, rows)


@torch.library.custom_op("rethinker::linear_selective_log_softmax_backward", mutates_args=())
def log_softmax_backward_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    temperature: float,
    softcap: float | None,
    saved: Tensor,
    entropies: Tensor,
    grad_logps: Tensor | None,
    grad_entropies: Tensor | None,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    head = Head(hidden, weight, bias, index, temperature, softcap)
    gradients = Gradients(head, (needs_hidden, needs_weight, needs_bias))
    gradients.accumulate_log_softmax(saved, entropies, grad_logps, grad_entropies)
    return tuple(gradient.to(hidden.dtype) for gradient in gradients.wide())


@log_softmax_backward_op.register_fake
def _(hidden, weight, bias, *rest):
    needed = zip((hidden, weight, bias), rest[-3:], strict=True)
    return tuple(torch.empty_like(x) if need else hidden.new_empty(0) for x, need in needed)


def _setup_log_softmax(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # an output that is not used gives None, and its work is left out
    hidden, weight, bias, index, ctx.temperature, ctx.softcap, _ = inputs
    _, entropies, saved = output
    ctx.save_for_backward(hidden, weight, bias, index, saved, entropies)


def _gradient_log_softmax(ctx, grad_logps, grad_entropies, _):
    hidden, weight, bias, index, saved, entropies = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    given = hidden, weight, bias, index, ctx.temperature, ctx.softcap, saved, entropies, grad_logps, grad_entropies
    gradients = log_softmax_backward_op(*given, *needs)
    return (*(g if need else None for g, need in zip(gradients, needs, strict=True)), *(None,) * 4)


log_softmax_op.register_autograd(_gradient_log_softmax, setup_context=_setup_log_softmax)
