"""Row kernels: log-prob and entropy of a row of logits in one read, its gradient in one read and one write.

A row's softmax is kept as (top, s, u) in powers of two: top its largest logit, d = (x - top) * scale with
scale = log2(e) / temperature, s = sum of 2^d and u = sum of 2^d * d. So log p = (x - top) / temperature - ln s, and
the entropy is ln s - ln 2 * u / s. Differences are taken before they are scaled: exact at any temperature. Under a
soft cap c a row is tanh(logits / c) at temperature T / c; without one none of that is compiled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from rethinker_kernels.arguments import row_temperature
from rethinker_kernels.devices import on_device_of, processors

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

LOWEST = tl.constexpr(-3.4028234663852886e38)
"""Below every logit but -inf; finite, so that a lane of banned entries only subtracts finite numbers."""

MAX_SCALE = tl.constexpr(2.0**126)
"""Stands for an infinite scale (temperature 0): 0 times it is 0, and any real difference times it gives 2^-inf."""

NO_MASS = tl.constexpr(-200.0)
"""2^-200 is 0 in fp32; a finite exponent in its place keeps 0 * -inf out of the entropy."""


@dataclass(frozen=True)
class Tiles:
    """Row kernels read [depth, lanes] logits at a time; each lane keeps a running maximum over its `depth` entries."""

    depth: int
    lane_bytes: int  # of logits in one of the `depth` lines: as many bytes in flight in 16 bits as in 32
    gradient: int  # columns a row kernel writes at a time
    warps: int


GPU = Tiles(depth=4, lane_bytes=2048, gradient=2048, warps=4)
"""Of bf16 logits on an H200, rows of 4 to 32 warps: the fastest forward, and no gradient slower by more than 2%."""

INTERPRETER, FEW = Tiles(depth=4, lane_bytes=256, gradient=512, warps=4), 7
"""Small, so that the interpreter's tests cross the borders of tiles at small sizes."""


def tiles(device: torch.device, rows: int) -> Tiles:
    """For so many rows: few do not fill the processors, and each is read and written twice as wide."""
    own, few = (GPU, 8 * processors(device)) if device.type == "cuda" else (INTERPRETER, FEW)
    if rows >= few:
        return own
    return Tiles(own.depth, 2 * own.lane_bytes, 2 * own.gradient, 2 * own.warps)


def registers(softcap: float | None) -> int | None:
    """Most that a thread may have. Left to itself, ptxas gives some capped forms too few on sm_80, by one."""
    return None if softcap is None else 128


@triton.jit
def at_least_no_mass(d):
    return tl.maximum(d, NO_MASS, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def row_offset(row, inner, outer_stride, inner_stride):
    """Where a row of logits [outer, inner, V] starts; rows * V exceeds 2^31, so in 64 bits."""
    outer = row // inner
    return outer.to(tl.int64) * outer_stride + (row - outer * inner).to(tl.int64) * inner_stride


@triton.jit
def inverse_and_scale(temperature):
    """1 / T (inf at 0, NaN for a temperature that is not one) and log2(e) / T, bounded."""
    temperature = tl.full([], temperature, tl.float32)
    inverse = tl.where(temperature > 0, 1.0 / temperature, tl.where(temperature == 0, float("inf"), float("nan")))
    scale = inverse * LOG2E
    return inverse, tl.where(scale > MAX_SCALE, MAX_SCALE, scale)


@triton.jit
def tanh(x):
    """To full precision: near 0 a polynomial in x^2 (of the smallest relative error), where the difference cancels."""
    square = x * x
    series = 0.020639084 - 0.005704984 * square
    series = 0.13331442 + (-0.053739714 + series * square) * square
    near = x + x * (square * (-0.33333281 + series * square))
    return tl.where(tl.abs(x) < 0.625, near, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def load_logits(place, inside, outside, SOFTCAP: tl.constexpr):
    """Logits in fp32, under a cap the tanh of logits / SOFTCAP; `outside` in place of those that are not `inside`."""
    x = tl.load(place, mask=inside, other=outside).to(tl.float32)
    if SOFTCAP is not None:
        x = tl.where(inside, tanh(x / SOFTCAP), outside)
    return x


@triton.jit
def row_lanes(
    row, vocabulary, scale, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """(top, s, u) of the row, per lane: one exp per entry, and one per DEPTH entries to rescale."""
    offsets = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    top = tl.full([LANES], LOWEST, tl.float32)
    s = tl.zeros([LANES], tl.float32)
    u = tl.zeros([LANES], tl.float32)
    for first in range(0, vocabulary, DEPTH * LANES):
        columns = first + offsets
        x = load_logits(row + columns, columns < vocabulary, -float("inf"), SOFTCAP)
        higher = tl.maximum(top, tl.max(x, axis=0))
        d = (x - higher[None, :]) * scale
        shift = (top - higher) * scale
        if ENTROPY:
            d = at_least_no_mass(d)
            shift = at_least_no_mass(shift)
        e = tl.exp2(d)
        keep = tl.exp2(shift)
        if ENTROPY:
            u = keep * (u + s * shift) + tl.sum(e * d, axis=0)
        s = s * keep + tl.sum(e, axis=0)
        top = higher
    return top, s, u


@triton.jit
def join(lane_top, lane_s, lane_u, scale):
    """One (top, s, u) from those of all lanes."""
    top = tl.max(lane_top, axis=0)
    shift = at_least_no_mass((lane_top - top) * scale)
    keep = tl.exp2(shift)
    return top, tl.sum(lane_s * keep, axis=0), tl.sum(keep * (lane_u + lane_s * shift), axis=0)


@triton.jit
def chosen_column(index, vocabulary):
    """The 64-bit `index` as a column in 32 bits, in which columns are compared with it; -1 if there is none such."""
    valid = (index >= 0) & (index < vocabulary)
    return tl.where(valid, index, -1).to(tl.int32)


@triton.jit
def chosen_logit(row, column, SOFTCAP: tl.constexpr):
    """The logit of a `chosen_column`, NaN if there is none: nothing is read out of bounds."""
    return load_logits(row + column, column >= 0, float("nan"), SOFTCAP)


@triton.jit
def log_prob_and_entropy(x, top, s, u, inverse):
    below = x - top
    log_s = tl.log2(s) * LN2
    logp = tl.where(below == 0.0, 0.0, below * inverse) - log_s
    # An index out of range has x = NaN, and its row no entropy either.
    entropy = tl.where(x == x, log_s - LN2 * (u / s), float("nan"))
    return logp, entropy


@triton.jit
def write_gradient(
    row, out, vocabulary, chosen, top, log2_s, scale, per_logp, per_entropy, entropy,
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """per_logp * d logp / dx + per_entropy * d entropy / dx, times T. `out` may be the row."""
    for first in range(0, vocabulary, TILE):
        columns = first + tl.arange(0, TILE)
        inside = columns < vocabulary
        x = load_logits(row + columns, inside, -float("inf"), SOFTCAP)
        log2_p = (x - top) * scale - log2_s
        if ENTROPY:
            log2_p = at_least_no_mass(log2_p)
        p = tl.exp2(log2_p)
        gradient = tl.where(columns == chosen, per_logp, 0.0) - per_logp * p
        if ENTROPY:
            gradient -= per_entropy * (p * (log2_p * LN2 + entropy))
        if SOFTCAP is not None:
            gradient *= (1.0 - x * x) / SOFTCAP
        tl.store(out + columns, gradient.to(out.dtype.element_ty), mask=inside)


@triton.jit
def write_zeros(out, vocabulary, TILE: tl.constexpr):
    for first in range(0, vocabulary, TILE):
        columns = first + tl.arange(0, TILE)
        tl.store(out + columns, tl.zeros([TILE], out.dtype.element_ty), mask=columns < vocabulary)


@triton.jit(do_not_specialize=["inner", "rows"])
def forward_kernel(
    logits, index, temperature, logps, entropies, saved,
    rows, inner, outer_stride, inner_stride, vocabulary,
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One program per row."""
    row = tl.program_id(0)
    inverse, scale = inverse_and_scale(temperature)
    x = logits + row_offset(row, inner, outer_stride, inner_stride)
    lane_top, lane_s, lane_u = row_lanes(x, vocabulary, scale, SOFTCAP, ENTROPY, DEPTH, LANES)
    top, s, u = join(lane_top, lane_s, lane_u, scale)
    chosen = chosen_column(tl.load(index + row), vocabulary)
    logp, entropy = log_prob_and_entropy(chosen_logit(x, chosen, SOFTCAP), top, s, u, inverse)
    tl.store(logps + row, logp)
    tl.store(saved + row, top)
    tl.store(saved + rows + row, tl.log2(s))
    if ENTROPY:
        tl.store(entropies + row, entropy)


@triton.jit(do_not_specialize=["inner", "rows"])
def backward_kernel(
    logits, out, index, temperature, saved, entropies, grad_logps, grad_entropies,
    rows, inner, outer_stride, inner_stride, out_stride, vocabulary,
    SOFTCAP: tl.constexpr, LOGPS: tl.constexpr, ENTROPY: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program per row. Rows without a gradient are written, and not read."""
    row = tl.program_id(0)
    chosen = chosen_column(tl.load(index + row), vocabulary)
    inverse, scale = inverse_and_scale(temperature)
    per_logp = 0.0
    if LOGPS:
        per_logp = tl.load(grad_logps + row).to(tl.float32)
    per_entropy = 0.0
    entropy = 0.0
    if ENTROPY:
        per_entropy = tl.load(grad_entropies + row).to(tl.float32)
        entropy = tl.load(entropies + row)
    place = out + row.to(tl.int64) * out_stride
    # At temperature 0 (1 / T = inf), or one that is none (NaN), there is no gradient.
    live = (chosen >= 0) & (inverse < float("inf"))
    if live & ((per_logp != 0.0) | (per_entropy != 0.0)):
        x = logits + row_offset(row, inner, outer_stride, inner_stride)
        top = tl.load(saved + row)
        log2_s = tl.load(saved + rows + row)
        write_gradient(
            x, place, vocabulary, chosen, top, log2_s, scale, per_logp * inverse, per_entropy * inverse, entropy,
            SOFTCAP, ENTROPY, TILE,
        )  # fmt: skip
    else:
        write_zeros(place, vocabulary, TILE)


def rows_of(logits: Tensor) -> tuple[Tensor, int, int, int, int]:
    """Logits [..., V] as rows: (the tensor, rows, rows of the inner dimension, outer stride, inner stride).

    Up to two leading dimensions keep their strides, as in `logits[:, :-1]`; what strides cannot express is copied.
    """
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        logits = logits.contiguous()
    if logits.dim() == 1:
        logits = logits.unsqueeze(0)
    if logits.dim() > 3:
        logits = logits.flatten(0, -2)
    if logits.dim() == 2:
        return logits, logits.shape[0], max(logits.shape[0], 1), 0, logits.stride(0)
    outer, inner, _ = logits.shape
    return logits, outer * inner, max(inner, 1), logits.stride(0), logits.stride(1)


def forward_rows(
    logits: Tensor, index: Tensor, temperature: float, return_entropy: bool, softcap: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `torch_rows.forward_rows`; all results are fp32."""
    logits, rows, inner, outer_stride, inner_stride = rows_of(logits)
    logps = torch.empty(rows, dtype=torch.float32, device=logits.device)
    entropies = logps.new_empty(rows if return_entropy else 0)
    saved = logps.new_empty(2, rows)
    if rows == 0:
        return logps, entropies, saved
    tile = tiles(logits.device, rows)
    with on_device_of(logits):
        forward_kernel[(rows,)](
            logits, _flat(index), row_temperature(temperature, softcap), logps, entropies, saved,
            rows, inner, outer_stride, inner_stride, logits.shape[-1], SOFTCAP=softcap, ENTROPY=return_entropy,
            DEPTH=tile.depth, LANES=tile.lane_bytes // logits.element_size(), num_warps=tile.warps,
            maxnreg=registers(softcap),
        )  # fmt: skip
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
    """As `torch_rows.gradient_rows`; `out` is [R, V]."""
    logits, rows, inner, outer_stride, inner_stride = rows_of(logits)
    if rows == 0:
        return out
    if grad_logps is None and grad_entropies is None:
        return out.zero_()
    tile = tiles(logits.device, rows)
    with on_device_of(logits):
        backward_kernel[(rows,)](
            logits, out, _flat(index), row_temperature(temperature, softcap), saved, entropies, _flat(grad_logps),
            _flat(grad_entropies), rows, inner, outer_stride, inner_stride, out.stride(-2), logits.shape[-1],
            SOFTCAP=softcap, LOGPS=grad_logps is not None, ENTROPY=grad_entropies is not None,
            TILE=tile.gradient, num_warps=tile.warps, maxnreg=registers(softcap),
        )  # fmt: skip
    return out


def _flat(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.reshape(-1).contiguous()
