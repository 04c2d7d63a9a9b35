"""Which implementation of the row kernels an op takes: Triton on a GPU or in its interpreter, else PyTorch."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
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


def on_device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Makes the tensor's GPU the current one: Triton launches on that, wherever its arguments are."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 0 for a CPU."""
    return _processors(device.index or 0) if device.type == "cuda" else 0


@cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count
