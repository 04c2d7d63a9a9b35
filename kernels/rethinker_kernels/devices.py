"""Which implementation of the row kernels an op takes: Triton on a GPU or in its interpreter, else PyTorch."""

from __future__ import annotations

import os
from types import ModuleType

import torch
from torch import Tensor

from rethinker_kernels import torch_rows


def takes_triton(tensor: Tensor) -> bool:
    """Whether Triton kernels run on this tensor: fp64 is the definition's, and CPU tensors need the interpreter."""
    if tensor.dtype == torch.float64:
        return False
    return tensor.is_cuda or (tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")


def row_kernels(tensor: Tensor) -> ModuleType:
    """The module whose `forward_rows` and `gradient_rows` fit this tensor."""
    if not takes_triton(tensor):
        return torch_rows
    from rethinker_kernels.triton_kernels import log_softmax

    return log_softmax
