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


def check_policy_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    *,
    cu_seqlens: Tensor | None,
    ref_logps: Tensor | None,
    weights: Tensor | None,
    mask: Tensor | None,
    normalizer: float | Tensor,
    aggregation: str,
    needs_sequences: bool,
    needs_reference: bool,
) -> None:
    check_vector("logps", logps, logps.shape[:1], logps.device)
    check_vector("old_logps", old_logps, logps.shape, logps.device)
    if aggregation not in ("token", "sequence", "constant"):
        raise ValueError(f"aggregation={aggregation!r}: must be one of token, sequence, constant")
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(f"normalizer: must be one number, not {describe(normalizer)}")
        if normalizer.device != logps.device:
            raise ValueError(f"normalizer: is on {normalizer.device}, the rest on {logps.device}")
    elif not normalizer > 0:
        raise ValueError(f"normalizer={normalizer}: must be positive")
    if ref_logps is not None:
        check_vector("ref_logps", ref_logps, logps.shape, logps.device)
    elif needs_reference:
        raise ValueError("ref_logps is needed with a kl_coef that is not 0")
    if cu_seqlens is not None:
        check_offsets("cu_seqlens", cu_seqlens, logps)
    elif needs_sequences:
        raise ValueError("cu_seqlens is needed with a loss or an aggregation per sequence")
    check_per_row("advantages", advantages, logps, cu_seqlens)
    if weights is not None:
        check_per_row("weights", weights, logps, cu_seqlens)
    if mask is not None:
        if mask.shape != logps.shape or mask.dtype != torch.bool:
            raise ValueError(f"mask: must be bool {list(logps.shape)}, not {describe(mask)}")
        if mask.device != logps.device:
            raise ValueError(f"mask: is on {mask.device}, the rest on {logps.device}")


def check_group_advantages(rewards: Tensor, group_offsets: Tensor, scale: str, eps: float) -> None:
    check_vector("rewards", rewards, rewards.shape[:1], rewards.device)
    if scale not in ("std", "none", "batch"):
        raise ValueError(f"scale={scale!r}: must be one of std, none, batch")
    if not eps >= 0:
        raise ValueError(f"eps={eps}: must be at least 0")
    check_offsets("group_offsets", group_offsets, rewards)
