"""Attention of one row of tokens, segment by segment: what flash-attention kernels compute, and how parts of it add up.

A segment is a run of queries that see a run of keys: all of them, or (causal) those up to their own place. Shared
prompts, ordinary sequences behind one another and a vision tower's windows are all made of segments; no mask is.

Legend: T tokens of the row, H query heads, K key heads (H or a divisor of it), E head size, N segments.
"""

from __future__ import annotations

from dataclasses import dataclass, is_dataclass, replace
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from rethinker_kernels.devices import to_device
from rethinker_kernels.merge_attention import merge_attention

T = TypeVar("T")


@dataclass(frozen=True)
class Segments:
    """Segment n: the queries queries[n] to queries[n + 1] see the keys keys[n] to keys[n + 1]."""

    queries: Tensor  # [N + 1] int32, from 0 to all
    keys: Tensor  # [N + 1] int32, from 0 to all
    longest_queries: int
    longest_keys: int

    @classmethod
    def of(cls, queries: Tensor, keys: Tensor) -> Segments:
        """From lengths [N], on the host."""
        bounds = [torch.cat([part.new_zeros(1), part.cumsum(0)]).int() for part in (queries, keys)]
        return cls(*bounds, int(queries.max()), int(keys.max()))


@dataclass(frozen=True)
class SharedKeys:
    """A prompt's keys, which its responses' queries see besides the keys of their own segment."""

    segments: Segments  # all queries of the row; those that see no shared key are segments with no keys
    keys: Tensor  # int64: the shared keys' places in the row
    queries: Tensor  # int64: the places of the queries that see some


@dataclass(frozen=True)
class Visible:
    """What each token of a row sees."""

    own: Segments  # each segment itself
    causal: bool
    shared: SharedKeys | None = None


def moved(part: T, device: torch.device) -> T:
    """The same tensor, or dataclass of such, on a device, without stopping the host."""
    if isinstance(part, Tensor):
        return to_device(part, device)
    if is_dataclass(part):
        return replace(part, **{name: moved(value, device) for name, value in vars(part).items()})
    return part


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Visible, scale: float) -> Tensor:
    """Attention [T, H, E], differentiable in q, k and v.

    Args:
        q: [T, H, E]; 16-bit on CUDA.
        k, v: [T, K, E].
        visible: on their device.
        scale: of the scores.
    """
    return _Attend.apply(q, k, v, visible, scale)


class _Attend(torch.autograd.Function):
    """Softmax over two sets of keys is the two results weighted by their shares of the sum of exponentials.

    The backward of a flash-attention kernel needs of a query only its output and log-sum-exp. Given the merged ones,
    each part's backward is exactly that part of the whole one.
    """

    @staticmethod
    def forward(ctx, q, k, v, visible, scale):
        shared = visible.shared
        out, lse = _forward(q, k, v, visible.own, visible.causal, scale)
        if shared is not None:
            part = _forward(q, k[shared.keys], v[shared.keys], shared.segments, False, scale)
            merge_attention(out, lse, *part, shared.queries)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.visible, ctx.scale = visible, scale
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        visible, scale, shared = ctx.visible, ctx.scale, ctx.visible.shared
        dq, dk, dv = _backward(grad, q, k, v, out, lse, visible.own, visible.causal, scale)
        if shared is not None:
            at = shared.keys
            part = _backward(grad, q, k[at], v[at], out, lse, shared.segments, False, scale)
            dq += part[0]
            dk.index_add_(0, at, part[1])
            dv.index_add_(0, at, part[2])
        return dq, dk, dv, None, None


def _forward(q, k, v, segments, causal, scale):
    """Output [T, H, E] and log-sum-exp [H, T] (fp32, or fp64 of fp64) over one set of keys, by torch's own kernels.

    A query without keys has the output 0, an undefined log-sum-exp, and no gradient.
    """
    if q.device.type != "cuda":
        return _cpu_forward(q, k, v, segments, causal, scale)
    return torch.ops.aten._flash_attention_forward(
        *_contiguous_heads(q, k, v), *_bounds(segments), 0.0, causal, False, scale=scale
    )[:2]


def _backward(grad, q, k, v, out, lse, segments, causal, scale):
    """Gradients of q, k and v."""
    if q.device.type != "cuda":
        return _cpu_backward(grad, q, k, v, out, lse, segments, causal, scale)
    seed = torch.empty(2, dtype=torch.uint64, device=q.device)  # of dropout: not read without it
    tensors = _contiguous_heads(grad, q, k, v, out)
    return torch.ops.aten._flash_attention_backward(
        *tensors, lse, *_bounds(segments), 0.0, causal, seed, seed, scale=scale
    )


def _bounds(segments: Segments) -> tuple[Tensor, Tensor, int, int]:
    # With one query a segment the kernel would fold heads into queries and return log-sum-exps in another order.
    return segments.queries, segments.keys, max(2, segments.longest_queries), segments.longest_keys


def _contiguous_heads(*tensors: Tensor) -> list[Tensor]:
    """The kernels take any strides but the last; an expanded gradient has 0 there."""
    return [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors]


def _pieces(segments: Segments):
    """(slice of queries, slice of keys) of every segment that has both."""
    for (a, b), (c, d) in zip(pairwise(segments.queries.tolist()), pairwise(segments.keys.tolist()), strict=True):
        if a < b and c < d:
            yield slice(a, b), slice(c, d)


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """[n, H, E] as torch's CPU kernel takes it: [1, H, n, E]."""
    return [tensor.transpose(0, 1)[None] for tensor in tensors]


def _cpu_forward(q, k, v, segments, causal, scale):
    out = torch.zeros_like(q)
    lse = q.new_full((q.shape[1], len(q)), torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    for queries, keys in _pieces(segments):
        given = _heads_first(q[queries], k[keys], v[keys])
        part, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*given, 0.0, causal, scale=scale)
        out[queries], lse[:, queries] = part[0].transpose(0, 1), sums[0]
    return out, lse


def _cpu_backward(grad, q, k, v, out, lse, segments, causal, scale):
    gradients = dq, dk, dv = [torch.zeros_like(x) for x in (q, k, v)]
    for queries, keys in _pieces(segments):
        given = _heads_first(grad[queries], q[queries], k[keys], v[keys], out[queries])
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *given, lse[None, :, queries], 0.0, causal, scale=scale
        )
        dq[queries], dk[keys], dv[keys] = (part[0].transpose(0, 1) for part in parts)
    return tuple(gradients)
