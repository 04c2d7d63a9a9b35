"""Two attention results become one: a program takes some queries of one head."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rethinker_kernels.devices import on_device_of

QUERIES = 32  # of a program
WARPS = 4


@triton.jit
def merge_kernel(
    out, lse, other, other_lse, rows, count, queries, width,
    out_row, out_head, other_row, other_head, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """`out` and `lse` of `BLOCK` of the `rows` at one head."""
    head = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + at, mask=at < count, other=0)
    lanes = tl.arange(0, WIDTH)
    inside = (at < count)[:, None] & (lanes < width)[None, :]

    mine = tl.load(lse + head * queries + row, mask=at < count, other=0.0)
    theirs = tl.load(other_lse + head * queries + row, mask=at < count, other=0.0)
    place = out + row[:, None] * out_row + head * out_head + lanes[None, :]
    a = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(other + row[:, None] * other_row + head * other_head + lanes[None, :], mask=inside, other=0.0)
    tl.debug_barrier()  # several threads may hold the same entry: all have read before one writes

    highest = tl.maximum(mine, theirs)
    share, rest = tl.exp(mine - highest), tl.exp(theirs - highest)
    total = share + rest
    merged = a * (share / total)[:, None] + b.to(tl.float32) * (rest / total)[:, None]
    tl.store(lse + head * queries + row, highest + tl.log(total), mask=at < count)
    tl.store(place, merged.to(out.dtype.element_ty), mask=inside)


def merge_attention(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor, rows: Tensor) -> None:
    """As `rethinker_kernels.merge_attention.merge_attention`."""
    queries, heads, width = out.shape
    if rows.numel() == 0:
        return
    strides = out.stride(0), out.stride(1), other.stride(0), other.stride(1)
    with on_device_of(out):
        merge_kernel[(triton.cdiv(rows.numel(), QUERIES), heads)](
            out, lse, other, other_lse, rows, rows.numel(), queries, width, *strides,
            BLOCK=QUERIES, WIDTH=triton.next_power_of_2(width), num_warps=WARPS,
        )  # fmt: skip
