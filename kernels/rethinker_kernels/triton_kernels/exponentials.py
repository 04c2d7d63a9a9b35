"""The head's matrix product with the softmax in its epilogue: logits leave the multiprocessor as 16-bit exponentials.

A chunk's logits exist as fp32 accumulators only. The epilogue turns them into e = 2^(z * scale - offset), with one
offset per row near the row's log-sum-exp, and adds up what log-prob and entropy need from the fp32 values. As e and the
gradient of the logits differ by a factor per row and by the chosen entry alone, the two products that follow run on e:

    dloss/dz = slope / T * (onehot - e / s) = scale_of_row * (e - s * onehot),  scale_of_row = -slope / (T * s)

The offset must be known before the product. The chosen token's logit minus its old log-prob is the log-sum-exp up to
the change of the log-prob since. Where that guess is more than LIMIT too low, the product is made again with the
offset that the first one found; the host never asks which it was.

Legend: C rows of a chunk, D hidden size, V vocabulary, N tiles that V is cut into.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rethinker_kernels.devices import on_device_of, processors
from rethinker_kernels.triton_kernels.log_softmax import LN2, LOG2E, NO_MASS

LIMIT = tl.constexpr(64.0)
"""An exponent above this asks for the second product; 2^64 is far from overflow in fp32 sums and in bf16."""

LOWEST_OLD = tl.constexpr(-40.0)
"""Old log-probs below this are taken for it, nats: 2^-58 is still an ordinary bf16 number."""

TILES = {"BM": 128, "BN": 256, "BK": 64, "GROUP": 16, "STAGES": 3}
WARPS = 8
"""Measured on an H200 among others, which differ by noise: benchmarks/results/nvidia-h200/first_runs.json."""

INTERPRETED = {"BM": 16, "BN": 32, "BK": 16, "GROUP": 2, "STAGES": 1}
"""Small, so that the interpreter's tests cross the borders of tiles at small sizes."""


@triton.jit
def offset_kernel(
    hidden, weight, index, old_logps, chosen, offsets, work,
    width, vocabulary, hidden_stride, weight_stride, scale, tiles, OLD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The chosen token's logit [C], NaN if there is no such token, and the offset [C] guessed from it."""
    row = tl.program_id(0)
    index_of_row = tl.load(index + row)
    valid = (index_of_row >= 0) & (index_of_row < vocabulary)
    place = tl.where(valid, index_of_row, 0)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < width
        x = tl.load(hidden + row.to(tl.int64) * hidden_stride + columns, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weight + place * weight_stride + columns, mask=inside, other=0.0).to(tl.float32)
        total += x * w
    z = tl.sum(total, axis=0)
    old = 0.0
    if OLD:
        old = tl.load(old_logps + row).to(tl.float32)
        old = tl.where(old == old, tl.minimum(tl.maximum(old, LOWEST_OLD), 0.0), 0.0)
    tl.store(chosen + row, tl.where(valid, z, float("nan")))
    tl.store(offsets + row, z * scale - old * LOG2E)
    if row == 0:
        tl.store(work, tiles)
        tl.store(work + 1, 0)


# A single row would become a constant, which has no 64-bit form. The rest would compile again as chunks change in size.
@triton.jit(do_not_specialize=["rows", "row_tiles"], do_not_specialize_on_alignment=["work", "offsets", "parts"])
def product_kernel(
    hidden, weight, out, offsets, parts, work, rows, vocabulary, width, out_stride, scale, row_tiles, column_tiles,
    PROGRAMS: tl.constexpr, STORE: tl.constexpr, PARTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """e [C, V] and, per row and tile of columns, its largest exponent, sum of e and sum of e times exponent [3, C, N].

    A persistent grid: each program takes every PROGRAMS-th tile, in groups of GROUP rows of tiles that share columns of
    the weight in L2. `work` says how many tiles there are to do.
    """
    per_group = GROUP * column_tiles
    for tile in tl.range(tl.program_id(0), tl.load(work), PROGRAMS):
        first = tile // per_group * GROUP
        height = tl.minimum(row_tiles - first, GROUP)
        top = (first + tile % height) * BM
        column_tile = tile % per_group // height
        left = column_tile * BN
        z = tl.zeros([BM, BN], tl.float32)
        for k in tl.range(0, width, BK, num_stages=STAGES):
            z = tl.dot(hidden.load([top, k]), weight.load([left, k]).T, z)
        row = top + tl.arange(0, BM)
        column = left + tl.arange(0, BN)
        row_inside = row < rows
        inside = (column < vocabulary)[None, :]
        d = z * scale - tl.load(offsets + row, mask=row_inside, other=0.0)[:, None]
        d = tl.maximum(tl.where(inside, d, NO_MASS), NO_MASS, propagate_nan=tl.PropagateNan.ALL)
        e = tl.exp2(d)
        if PARTS:
            place = parts + row.to(tl.int64) * column_tiles + column_tile
            kind = rows.to(tl.int64) * column_tiles
            tl.store(place, tl.max(d, axis=1), mask=row_inside)
            tl.store(place + kind, tl.sum(e, axis=1), mask=row_inside)
            tl.store(place + 2 * kind, tl.sum(e * d, axis=1), mask=row_inside)
        if STORE:
            target = out + row.to(tl.int64)[:, None] * out_stride + column[None, :]
            tl.store(target, e.to(out.dtype.element_ty), mask=row_inside[:, None] & inside)


@triton.jit
def raise_kernel(parts, offsets, work, tiles, column_tiles, BLOCK: tl.constexpr):
    """A row whose exponents go beyond LIMIT gets an offset that they stay below, and all tiles are to do again."""
    row = tl.program_id(0)
    highest = tl.full([BLOCK], NO_MASS, tl.float32)
    for first in range(0, column_tiles, BLOCK):
        part = first + tl.arange(0, BLOCK)
        place = parts + row.to(tl.int64) * column_tiles + part
        highest = tl.maximum(highest, tl.load(place, mask=part < column_tiles, other=NO_MASS))
    top = tl.max(highest, axis=0)
    if (top > LIMIT) & (top < float("inf")):
        tl.store(offsets + row, tl.load(offsets + row) + top)
        tl.atomic_max(work + 1, tiles)


@triton.jit(do_not_specialize=["rows"])
def total_kernel(
    parts, chosen, offsets, logps, entropies, saved, sums, rows, column_tiles, scale, ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Log-prob and entropy [C] of the chosen tokens, the sums of e [C], and what a later product needs [2, C]."""
    row = tl.program_id(0)
    lane_s = tl.zeros([BLOCK], tl.float32)
    lane_u = tl.zeros([BLOCK], tl.float32)
    kind = rows.to(tl.int64) * column_tiles
    for first in range(0, column_tiles, BLOCK):
        part = first + tl.arange(0, BLOCK)
        place = parts + row.to(tl.int64) * column_tiles + part
        lane_s += tl.load(place + kind, mask=part < column_tiles, other=0.0)
        lane_u += tl.load(place + 2 * kind, mask=part < column_tiles, other=0.0)
    s = tl.sum(lane_s, axis=0)
    log2_s = tl.log2(s)
    z = tl.load(chosen + row)
    offset = tl.load(offsets + row)
    tl.store(logps + row, (z * scale - offset - log2_s) * LN2)
    tl.store(saved + row, offset / scale)
    tl.store(saved + rows + row, log2_s)
    tl.store(sums + row, s)
    if ENTROPY:
        # A token that does not exist has no entropy either.
        entropy = tl.where(z == z, (log2_s - tl.sum(lane_u, axis=0) / s) * LN2, float("nan"))
        tl.store(entropies + row, entropy)


@triton.jit
def close_kernel(out, index, chosen, offsets, sums, slopes, scales, vocabulary, out_stride, scale, inverse):
    """Takes the sum of e from the chosen entry and says what every row is to be multiplied by [C]."""
    row = tl.program_id(0)
    slope = tl.load(slopes + row).to(tl.float32)
    index_of_row = tl.load(index + row)
    valid = (index_of_row >= 0) & (index_of_row < vocabulary)
    s = tl.load(sums + row)
    e = tl.exp2(tl.load(chosen + row) * scale - tl.load(offsets + row))
    tl.store(out + row.to(tl.int64) * out_stride + index_of_row, (e - s).to(out.dtype.element_ty), mask=valid)
    tl.store(scales + row, tl.where(valid & (slope != 0.0), -slope * inverse / s, 0.0))


class Exponentials:
    """A chunk's product with the head, as e and the statistics of its rows."""

    def __init__(self, hidden: Tensor, weight: Tensor, index: Tensor, temperature: float, out: Tensor | None) -> None:
        """
        Args:
            hidden: [C, D], weight: [V, D], index: [C] int64; as `devices.takes_exponentials` says.
            temperature: of all rows.
            out: [C, V] of hidden's type and any row stride, which e is written to; None if only statistics are wanted.
        """
        self.hidden, self.weight, self.index, self.out = hidden, weight, index.contiguous(), out
        self.inverse = 1.0 / temperature
        self.scale = LOG2E.value / temperature
        self.shape, self.lanes = (TILES, 1024) if hidden.is_cuda else (INTERPRETED, 32)
        self.programs = processors(hidden.device) or 3
        self.row_tiles = triton.cdiv(len(hidden), self.shape["BM"])
        self.column_tiles = triton.cdiv(len(weight), self.shape["BN"])
        self.tiles = self.row_tiles * self.column_tiles
        self.chosen, self.offsets, self.sums = hidden.new_empty(3, len(hidden), dtype=torch.float32)
        self.work = torch.empty(2, dtype=torch.int32, device=hidden.device)

    def measure(self, old_logps: Tensor | None, return_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Makes the product. Returns log-probs [C], entropies [C] ([0] if not asked for) and `forward_rows`'s [2, C].

        Args:
            old_logps: [C] what the log-probs are expected to be near, if anything is known: never more than a guess.
        """
        rows = len(self.chosen)
        logps = torch.empty_like(self.chosen)
        entropies = logps.new_empty(rows if return_entropy else 0)
        saved = logps.new_empty(2, rows)
        parts = logps.new_empty(3, rows, self.column_tiles)
        with on_device_of(self.hidden):
            self._guess(old_logps)
            self._product(self.work, parts)
            raise_kernel[(rows,)](parts, self.offsets, self.work, self.tiles, self.column_tiles, BLOCK=self.lanes)
            self._product(self.work[1:], parts)
            total_kernel[(rows,)](
                parts, self.chosen, self.offsets, logps, entropies, saved, self.sums, rows, self.column_tiles,
                self.scale, ENTROPY=return_entropy, BLOCK=self.lanes,
            )  # fmt: skip
        return logps, entropies, saved

    def repeat(self, saved: Tensor) -> None:
        """Makes the product again, with what `measure` returned [2, C]: e is then the probability."""
        with on_device_of(self.hidden):
            self._guess(None)
            torch.add(saved[1], saved[0], alpha=self.scale, out=self.offsets)
            self.sums.fill_(1.0)
            self._product(self.work, None)

    def close(self, slopes: Tensor) -> Tensor:
        """Makes `out` the gradient of the logits up to a factor per row, which is returned [C] fp32.

        Args:
            slopes: [C] d loss / d log-prob.
        """
        scales = torch.empty_like(self.chosen)
        with on_device_of(self.hidden):
            close_kernel[(len(scales),)](
                self.out, self.index, self.chosen, self.offsets, self.sums, slopes.contiguous(), scales,
                self.weight.shape[0], self.out.stride(0), self.scale, self.inverse, num_warps=1,
            )  # fmt: skip
        return scales

    def _guess(self, old_logps: Tensor | None) -> None:
        offset_kernel[(len(self.chosen),)](
            self.hidden, self.weight, self.index, old_logps, self.chosen, self.offsets, self.work,
            self.hidden.shape[1], self.weight.shape[0], self.hidden.stride(0), self.weight.stride(0), self.scale,
            self.tiles, OLD=old_logps is not None, BLOCK=self.lanes,
        )  # fmt: skip

    def _product(self, work: Tensor, parts: Tensor | None) -> None:
        rows, columns = ([self.shape[side], self.shape["BK"]] for side in ("BM", "BN"))
        product_kernel[(self.programs,)](
            TensorDescriptor.from_tensor(self.hidden, rows), TensorDescriptor.from_tensor(self.weight, columns),
            self.out, self.offsets, parts, work, self.hidden.shape[0], self.weight.shape[0], self.hidden.shape[1],
            0 if self.out is None else self.out.stride(0), self.scale, self.row_tiles, self.column_tiles,
            PROGRAMS=self.programs, STORE=self.out is not None, PARTS=parts is not None, **self.shape,
            num_warps=WARPS,
        )  # fmt: skip
