"""A gradient times the gradient of its loss: in fp32, and only then rounded to its own type."""

from __future__ import annotations

import torch
from torch import Tensor

from rethinker_kernels.arguments import wide
from rethinker_kernels.devices import takes_triton
from rethinker_kernels.torch_rows import CHUNK_BYTES, slices


@torch.library.custom_op("rethinker::scaled", mutates_args=())
def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor in `dtype`, without a copy in a wider type.

    Args:
        gradient: any shape, of `dtype` or wider.
        factor: one number, on the same device.
    """
    if takes_triton(gradient):
        from rethinker_kernels.triton_kernels.scaled import scaled

        return scaled(gradient, factor, dtype)
    out = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    for part in slices(0, gradient.numel(), CHUNK_BYTES // 4):
        out.view(-1)[part] = gradient.reshape(-1)[part] * factor.to(wide(gradient))
    return out


@scaled.register_fake
def _(gradient, factor, dtype):
    return torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
