"""A tensor times one number on the device, in fp32, written in another type in the same pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rethinker_kernels.devices import on_device_of
from rethinker_kernels.triton_kernels.tiles import tiles


@triton.jit
def scaled_kernel(values, factor, out, count, TILE: tl.constexpr):
    """TILE numbers per program; there may be more than 2^31."""
    by = tl.load(factor).to(tl.float32)
    position = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = position < count
    x = tl.load(values + position, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + position, (x * by).to(out.dtype.element_ty), mask=inside)


def scaled(values: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """(values * factor) in `dtype`, contiguous; the factor is one number, floating."""
    values = values.contiguous()
    out = torch.empty(values.shape, dtype=dtype, device=values.device)
    if values.numel():
        tile = tiles(values.device)
        with on_device_of(values):
            scaled_kernel[(triton.cdiv(values.numel(), tile.scaled),)](
                values, factor, out, values.numel(), TILE=tile.scaled, num_warps=4
            )
    return out
