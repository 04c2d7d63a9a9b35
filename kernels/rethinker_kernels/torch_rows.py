"""The row kernels in plain PyTorch, for CPU tensors and fp64: a few rows at a time, in place, of bounded memory.

The same functions as in `triton_kernels.log_softmax`. Under a soft cap c at temperature T a row is tanh(logits / c) at
temperature T / c. Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rethinker_kernels.arguments import row_temperature, wide
from rethinker_kernels.chunks import CPU_LOGITS_BYTES, slices

_NO_MASS = -1e4
"""exp of it is 0; a finite exponent in place of -inf keeps 0 * -inf out of the entropy."""


def forward_rows(
    logits: Tensor, index: Tensor, temperature: float, return_entropy: bool, softcap: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs [R], entropies [R] ([0] if not asked for) and what `gradient_rows` needs [2, R].

    Args:
        logits: [..., V] with R rows in all.
        index: int64, R in all.
        temperature, softcap: of all rows.
    """
    logits = logits.reshape(-1, logits.shape[-1])
    index, inverse = index.reshape(-1), _inverse(logits, temperature, softcap)
    logps = logits.new_empty(logits.shape[0], dtype=wide(logits))
    entropies = torch.empty_like(logps[: logps.shape[0] if return_entropy else 0])
    saved = logits.new_empty(2, logits.shape[0], dtype=wide(logits))
    for rows in _pieces(logits.shape[0], logits.shape[1] * logps.element_size()):
        x = logits[rows].to(logps.dtype, copy=True)  # [C, V]
        if softcap is not None:
            x.div_(softcap).tanh_()
        top = x.amax(-1)
        x -= torch.where(top == -math.inf, torch.finfo(x.dtype).min, top)[:, None]
        valid = (index[rows] >= 0) & (index[rows] < x.shape[1])
        below = x.gather(1, torch.where(valid, index[rows], 0)[:, None])[:, 0]
        x.mul_(_finite(inverse)).clamp_(min=_NO_MASS)
        e = x.exp()
        s = e.sum(-1)
        logp = torch.where(below == 0, 0.0, below * inverse) - s.log()
        logps[rows] = torch.where(valid, logp, math.nan)
        saved[0, rows], saved[1, rows] = top, s.log()
        if return_entropy:
            entropies[rows] = torch.where(valid, s.log() - e.mul_(x).sum(-1) / s, math.nan)
    return logps, entropies, saved


def gradient_rows(
    logits: Tensor,
    index: Tensor,
    temperature: float,
    saved: Tensor,
    entropies: Tensor | None,
    grad_logps: Tensor | None,
    grad_entropies: Tensor | None,
    softcap: float | None = None,
    *,
    out: Tensor,
) -> Tensor:
    """The gradient of the logits, into `out` [..., V] of any type, which may be the logits themselves.

    Args: `saved` and `entropies` are `forward_rows`'s; a gradient that is None is 0.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    index, inverse = index.reshape(-1), _inverse(flat, temperature, softcap)
    vocabulary = flat.shape[1]
    live = (index >= 0) & (index < vocabulary) & (inverse < math.inf)
    none = torch.zeros_like(saved[0])
    per_logp, per_entropy = (
        none if g is None else torch.where(live, g.reshape(-1).to(none.dtype) * inverse, none)
        for g in (grad_logps, grad_entropies)
    )
    into = out.view(-1, vocabulary)
    for rows in _pieces(flat.shape[0], vocabulary * saved.element_size()):
        x = flat[rows].to(saved.dtype, copy=True)  # [C, V]
        if softcap is not None:
            slope = x.div_(softcap).tanh_().square().neg_().add_(1).div_(softcap)
        x.sub_(saved[0, rows, None]).mul_(_finite(inverse)).sub_(saved[1, rows, None])
        x.clamp_(min=_NO_MASS)  # log p
        if grad_entropies is None:
            x.exp_().mul_(-per_logp[rows, None])
        else:
            p = x.exp()
            x.add_(entropies[rows, None]).mul_(per_entropy[rows, None]).add_(per_logp[rows, None]).mul_(p).neg_()
        at = torch.where(live[rows], index[rows], 0)[:, None]
        x.scatter_add_(1, at, per_logp[rows, None])
        if softcap is not None:
            x.mul_(slope)
        # Also where p is NaN: a row without a gradient has exactly none.
        x.masked_fill_(((per_logp[rows] == 0) & (per_entropy[rows] == 0))[:, None], 0.0)
        into[rows] = x
    return out


def _pieces(rows: int, row_bytes: int) -> list[slice]:
    """Rows of which at most CPU_LOGITS_BYTES are worked on at a time."""
    return slices(0, rows, max(CPU_LOGITS_BYTES // row_bytes, 1))


def _inverse(logits: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """A scalar: 1 / T of the rows, which is inf at 0."""
    return 1 / torch.full((), abs(row_temperature(temperature, softcap)), dtype=wide(logits), device=logits.device)


def _finite(inverse: Tensor) -> Tensor:
    """With the largest number for inf: 0 times it is 0, and any real difference times it is below _NO_MASS."""
    return inverse.clamp(max=torch.finfo(inverse.dtype).max)
