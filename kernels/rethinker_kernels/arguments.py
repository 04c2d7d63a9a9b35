"""Argument checks of the ops: shapes, types and devices, which the host knows without asking the device.

Each raises ValueError naming the argument, what it must be and what it is.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wide(tensor: Tensor) -> torch.dtype:
    """The type that results are computed in: fp32, or fp64 for fp64."""
    return torch.promote_types(tensor.dtype, torch.float32)


def describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def check_logits(logits: Tensor) -> None:
    if logits.dim() < 1 or logits.shape[-1] == 0 or not logits.is_floating_point():
        raise ValueError(f"logits: must be floating [..., V] with V > 0, not {describe(logits)}")


def check_index(index: Tensor, shape: torch.Size, device: torch.device) -> None:
    if index.shape != shape or index.dtype != torch.int64:
        raise ValueError(f"index: must be int64 {list(shape)}, not {describe(index)}")
    if index.device != device:
        raise ValueError(f"index: is on {index.device}, the rest on {device}")


def check_vector(name: str, values: Tensor, shape: torch.Size, device: torch.device) -> None:
    if values.dim() != 1 or values.shape != shape or not values.is_floating_point():
        raise ValueError(f"{name}: must be floating {list(shape) or '[R]'}, not {describe(values)}")
    if values.device != device:
        raise ValueError(f"{name}: is on {values.device}, the rest on {device}")


def check_temperature(temperature: float | Tensor, index: Tensor) -> float | Tensor:
    if not isinstance(temperature, Tensor):
        if not temperature >= 0:
            raise ValueError(f"temperature={temperature}: must be at least 0")
        return float(temperature)
    if temperature.dim() == 0:
        temperature = temperature.expand(index.shape)
    if temperature.shape != index.shape or not temperature.is_floating_point():
        raise ValueError(f"temperature: must be floating {list(index.shape)}, not {describe(temperature)}")
    if temperature.device != index.device:
        raise ValueError(f"temperature: is on {temperature.device}, the rest on {index.device}")
    return temperature


def check_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if hidden.dim() != 2 or not hidden.is_floating_point():
        raise ValueError(f"hidden: must be floating [R, D], not {describe(hidden)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] == 0 or weight.dtype != hidden.dtype:
        raise ValueError(
            f"weight: must be [V, {hidden.shape[1]}] of the type of hidden, {describe(hidden)}, not {describe(weight)}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != hidden.dtype):
        raise ValueError(f"bias: must be of the weight's type, [{weight.shape[0]}], not {describe(bias)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name}: is on {tensor.device}, hidden on {hidden.device}")


def check_offsets(name: str, offsets: Tensor, rows: Tensor) -> None:
    if offsets.dim() != 1 or offsets.numel() < 1 or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: must be [S + 1] int32 or int64, not {describe(offsets)}")
    if offsets.device != rows.device:
        raise ValueError(f"{name}: is on {offsets.device}, the rest on {rows.device}")
    if offsets.numel() == 1 and rows.shape[0]:
        raise ValueError(f"{name}: names no sequence for {rows.shape[0]} rows")


def check_per_row(name: str, values: Tensor, rows: Tensor, cu_seqlens: Tensor | None) -> None:
    sequences = None if cu_seqlens is None else cu_seqlens.numel() - 1
    fits = values.dim() == 1 and values.shape[0] in (rows.shape[0], sequences)
    if not fits or not values.is_floating_point():
        expected = f"[{rows.shape[0]}] (rows)" + (f" or [{sequences}] (sequences)" if sequences is not None else "")
        raise ValueError(f"{name}: must be floating {expected}, not {describe(values)}")
    if values.device != rows.device:
        raise ValueError(f"{name}: is on {values.device}, the rest on {rows.device}")
