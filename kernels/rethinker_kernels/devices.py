"""What a tensor's device decides: Triton or PyTorch, the kind of product, how to copy and where to launch."""

from __future__ import annotations

import math
import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def takes_triton(tensor: Tensor) -> bool:
    """Whether Triton kernels run on this tensor: fp64 is the definition's, and CPU tensors need the interpreter."""
    if tensor.dtype == torch.float64:
        return False
    return tensor.is_cuda or (tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")


def takes_exponentials(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> bool:
    """Whether the head's product leaves exponentials instead of logits (triton_kernels/exponentials.py).

    On a Hopper GPU, for bf16 rows that its copy engine can read (16-byte strides), without a bias. Everything else
    has fp32 logits: those also subtract before they divide by the temperature, which counts below 0.1.
    """
    if not hidden.is_cuda or hidden.dtype != torch.bfloat16 or torch.cuda.get_device_capability(hidden.device)[0] != 9:
        return False
    aligned = all(t.stride(1) == 1 and t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0 for t in (hidden, weight))
    return aligned and bias is None and 0.1 <= temperature < math.inf


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on a device. From ordinary host memory the copy would wait for all that the device has yet to do."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def on_device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Makes the tensor's GPU the current one: Triton launches on that, wherever its arguments are."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 0 for a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0
