"""Attention of one row of tokens, segment by segment: what flash-attention kernels compute, and how parts of it add up.

A segment is a run of queries that see a run of keys: all of them, or (causal) those up to their own place. Shared
prompts, ordinary sequences behind one another and a vision tower's windows are all made of segments; no mask is.

Legend: T tokens of the row, H query heads, K key heads (H or a divisor of it), E head size, N segments.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from rethinker_kernels.devices import to_device
from rethinker_kernels.merge_attention import merge_attention

T = TypeVar("T")


@dataclass(frozen=True)
class Padded:
    """The queries, or the keys, of N segments, each padded to A tokens, the longest one's, by its last token."""

    places: Tensor  # [N * A] int64, in the row of T tokens
    real: Tensor  # [N, A] bool: is no padding
    into: Tensor  # [N * A] int64: the places again, but T for padding

    @classmethod
    def of(cls, starts: Tensor, lengths: Tensor, tokens: int) -> Padded:
        """From starts and lengths [N] and the row's T, on the host."""
        step = torch.arange(int(lengths.max()))
        real = step < lengths[:, None]
        places = starts[:, None] + step.minimum(lengths[:, None] - 1)
        return cls(places.flatten(), real, places.masked_fill(~real, tokens).flatten())

    def of_row(self, row: Tensor) -> Tensor:
        """[T, H, E] to [N, H, A, E]."""
        return row.index_select(0, self.places).view(*self.real.shape, *row.shape[1:]).transpose(1, 2)

    def into_row(self, part: Tensor, row: Tensor) -> None:
        """Write [N, H, A, E] to its places in `row` [T + 1, H, E], which has a last one for padding."""
        row.index_copy_(0, self.into, part.transpose(1, 2).flatten(0, 1))


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

    @functools.cached_property
    def padded(self) -> list[tuple[Padded, Padded]]:
        """Queries and keys of all segments that have both, those of about the same lengths together."""
        lengths = torch.stack([self.queries.diff(), self.keys.diff()], dim=1).long()  # [N, 2]
        # At most a quarter of a segment is padding, or 7 tokens.
        step = 2 ** (lengths.clamp(min=1).log2().floor().long() - 2).clamp(min=3)
        rounded = (lengths + step - 1) // step * step
        found = []
        for size in rounded[lengths.all(dim=1)].unique(dim=0):
            of = (rounded == size).all(dim=1)
            sides = enumerate((self.queries, self.keys))
            found.append(tuple(Padded.of(at[:-1][of], lengths[of, side], int(at[-1])) for side, at in sides))
        return found


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
    """The same tensor, or tuple, dict or dataclass of such, on a device, without stopping the host."""
    if isinstance(part, Tensor):
        return to_device(part, device)
    if isinstance(part, tuple):
        return tuple(moved(x, device) for x in part)
    if isinstance(part, dict):
        return {name: moved(x, device) for name, x in part.items()}
    if is_dataclass(part):
        return replace(part, **{field.name: moved(getattr(part, field.name), device) for field in fields(part)})
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
            part = _forward(q, *_shared(shared, k, v), shared.segments, False, scale)
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
            part = _backward(grad, q, *_shared(shared, k, v), out, lse, shared.segments, False, scale)
            dq += part[0]
            dk.index_add_(0, shared.keys, part[1])
            dv.index_add_(0, shared.keys, part[2])
        return dq, dk, dv, None, None


def _shared(shared, k, v):
    """The shared prompts' keys and values, [S, K, E] each."""
    return k.index_select(0, shared.keys), v.index_select(0, shared.keys)


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


def _cpu_forward(q, k, v, segments, causal, scale):
    """One call for all segments of about the same lengths; a call for each would cost more than their arithmetic."""
    T, H, _ = q.shape
    out, lse = _row_for(q), q.new_full((T + 1, H), torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    for queries, keys in segments.padded:
        part, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries.of_row(q),
            keys.of_row(k),
            keys.of_row(v),
            dropout_p=0.0,
            is_causal=causal,
            attn_mask=_padding_mask(keys, causal, q.dtype),
            scale=scale,
        )
        queries.into_row(part, out)
        queries.into_row(sums[..., None], lse[..., None])
    return out[:T], lse[:T].t().contiguous()


def _cpu_backward(grad, q, k, v, out, lse, segments, causal, scale):
    gradients = [_row_for(x) for x in (q, k, v)]
    for queries, keys in segments.padded:
        # With inf a padding query's probabilities are 0, and so are its shares of the gradients.
        sums = queries.of_row(lse.t()[..., None])[..., 0].masked_fill(~queries.real[:, None], torch.inf)  # [N, H, A]
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            queries.of_row(grad),
            queries.of_row(q),
            keys.of_row(k),
            keys.of_row(v),
            queries.of_row(out),
            sums,
            dropout_p=0.0,
            is_causal=causal,
            attn_mask=_padding_mask(keys, causal, q.dtype),
            scale=scale,
        )
        for side, part, row in zip((queries, keys, keys), parts, gradients, strict=True):
            side.into_row(part, row)
    return [row[:-1] for row in gradients]


def _row_for(x: Tensor) -> Tensor:
    """Zeros [T + 1, ...] for x [T, ...]: what no segment writes stays 0, and padding goes to the last place."""
    return x.new_zeros(len(x) + 1, *x.shape[1:])


def _padding_mask(keys: Padded, causal: bool, dtype: torch.dtype) -> Tensor | None:
    """What hides padding keys, added to the scores [N, 1, 1, B]. None where nothing need hide them: in causal segments,
    whose queries and keys are the same, they come after all real queries."""
    if causal or keys.real.all():
        return None
    return torch.zeros(keys.real.shape, dtype=dtype).masked_fill(~keys.real, -torch.inf)[:, None, None]
