"""selective_log_softmax: log-probabilities and entropies of chosen tokens, from logits."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from rethinker_kernels import torch_rows
from rethinker_kernels.arguments import check, check_softcap, check_temperature, describe, wide
from rethinker_kernels.devices import takes_triton


def selective_log_softmax(
    logits: Tensor,
    index: Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
    softcap: float | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of one chosen entry per row, and the row's entropy.

        logits = logits.float() if softcap is None else softcap * (logits.float() / softcap).tanh()
        log_probs = (logits / temperature).log_softmax(-1)
        logps, entropy = log_probs.gather(-1, index[..., None])[..., 0], -(log_probs.exp() * log_probs).sum(-1)

    One read of the logits forward, one read and one write backward; no fp32 copy of the logits and no [..., V]
    probabilities are allocated. Leading strides of up to two dimensions are kept, so `logits[:, :-1]` is not copied.

    Args:
        logits: [..., V] floating; -inf marks a banned entry and is legal in values and gradients.
        index: [...] int64. An index outside [0, V) turns its row into NaN and gives it no gradient.
        temperature: of all rows, >= 0. 0 is the limit: all mass on the largest logits, no gradient.
        return_entropy: also return the entropy of the tempered distribution, in nats.
        softcap: Gemma's soft cap of logits, > 0. Under it -inf is the logit -softcap, and no ban: vLLM caps what the
            head gives, and bans tokens afterwards.

    Returns:
        logps [...], and entropy [...] if asked; fp32 (fp64 for fp64 logits). Both differentiable (once) in `logits`.

    Raises:
        ValueError: a shape, type or device that does not fit, a temperature below 0, or a softcap not above 0.
    """
    if logits.dim() < 1 or logits.shape[-1] == 0 or not logits.is_floating_point():
        raise ValueError(f"logits: must be floating [..., V] with V > 0, not {describe(logits)}")
    check("index", index, logits.shape[:-1], like=logits, dtypes=(torch.int64,))
    options = check_temperature(temperature), return_entropy, check_softcap(softcap)
    logps, entropies, _ = _forward(logits, index, *options)
    logps = logps.view(index.shape)
    return (logps, entropies.view(index.shape)) if return_entropy else logps


@torch.library.custom_op("rethinker::selective_log_softmax", mutates_args=())
def _forward(
    logits: Tensor, index: Tensor, temperature: float, return_entropy: bool, softcap: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    return row_kernels(logits).forward_rows(logits, index, temperature, return_entropy, softcap)


@_forward.register_fake
def _(logits, index, temperature, return_entropy, softcap=None):
    rows = index.numel()
    like = logits.new_empty(rows, dtype=wide(logits))
    return like, like.new_empty(rows if return_entropy else 0), like.new_empty(2, rows)


@torch.library.custom_op("rethinker::selective_log_softmax_backward", mutates_args=())
def _backward(
    logits: Tensor,
    index: Tensor,
    temperature: float,
    saved: Tensor,
    entropies: Tensor,
    grad_logps: Tensor | None,
    grad_entropies: Tensor | None,
    softcap: float | None = None,
) -> Tensor:
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    of_rows = logits, index, temperature, saved, entropies, grad_logps, grad_entropies, softcap
    row_kernels(logits).gradient_rows(*of_rows, out=out.view(-1, logits.shape[-1]))
    return out


@_backward.register_fake
def _(logits, *_):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _setup(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # an output that is not used gives None, and its work is left out
    logits, index, ctx.temperature, _, ctx.softcap = inputs
    _, entropies, saved = output
    ctx.save_for_backward(logits, index, saved, entropies)


def _gradient(ctx, grad_logps, grad_entropies, _):
    logits, index, saved, entropies = ctx.saved_tensors
    of_rows = logits, index, ctx.temperature, saved, entropies, grad_logps, grad_entropies
    return _backward(*of_rows, ctx.softcap), *(None,) * 4


_forward.register_autograd(_gradient, setup_context=_setup)


def row_kernels(tensor: Tensor) -> ModuleType:
    """The module whose `forward_rows` and `gradient_rows` fit this tensor."""
    if not takes_triton(tensor):
        return torch_rows
    from rethinker_kernels.triton_kernels import log_softmax

    return log_softmax
