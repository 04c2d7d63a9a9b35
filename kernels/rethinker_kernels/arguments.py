"""Argument checks of the ops: shapes, types and devices, which the host knows without asking the device.

Each raises ValueError naming the argument, what it must be and what it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor


def wide(tensor: Tensor) -> torch.dtype:
    """The type that results are computed in: fp32, or fp64 for fp64."""
    return torch.promote_types(tensor.dtype, torch.float32)


def describe(tensor: Tensor) -> str:
    return f"{_short(tensor.dtype)} {list(tensor.shape)}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check(
    name: str, values: Tensor, *shapes: Sequence[int], like: Tensor | None = None, dtypes: Sequence[torch.dtype] = ()
) -> None:
    """`values` must be of one of the shapes, floating or of one of the types, and on the device of `like`."""
    if values.shape not in shapes or not (values.dtype in dtypes if dtypes else values.is_floating_point()):
        kinds, sizes = map(_short, dtypes), (str(list(shape)) for shape in shapes)
        wanted = f"{' or '.join(kinds) or 'floating'} {' or '.join(sizes)}"
        raise ValueError(f"{name}: must be {wanted}, not {describe(values)}")
    if like is not None and values.device != like.device:
        raise ValueError(f"{name}: is on {values.device}, the rest on {like.device}")


def check_choice(name: str, value: str, *options: str) -> None:
    if value not in options:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(options)}")


def check_temperature(temperature: float) -> float:
    if isinstance(temperature, Tensor) or not temperature >= 0:
        raise ValueError(f"temperature={temperature}: must be one number, at least 0")
    return float(temperature)


def check_softcap(softcap: float | None) -> float | None:
    if softcap is None:
        return None
    if not isinstance(softcap, Real) or not 1e-30 < softcap < 1e30:  # whose quotients fp32 can hold
        raise ValueError(f"softcap={softcap}: must be one number above 0, or None")
    return float(softcap)


def row_temperature(temperature: float, softcap: float | None) -> float:
    """At which the row kernels take a row: under a soft cap c it is tanh(logits / c) at temperature T / c."""
    return temperature / (softcap or 1.0)


def check_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor) -> None:
    if hidden.dim() != 2 or not hidden.is_floating_point():
        raise ValueError(f"hidden: must be floating [R, D], not {describe(hidden)}")
    like = {"like": hidden, "dtypes": (hidden.dtype,)}
    check("weight", weight, (max(len(weight), 1), hidden.shape[1]), **like)
    if bias is not None:
        check("bias", bias, (len(weight),), **like)
    check("index", index, hidden.shape[:1], like=hidden, dtypes=(torch.int64,))


def check_offsets(name: str, offsets: Tensor, rows: Tensor) -> None:
    check(name, offsets, (max(offsets.numel(), 1),), like=rows, dtypes=(torch.int32, torch.int64))
    if offsets.numel() == 1 and rows.shape[0]:
        raise ValueError(f"{name}: names no sequence for {rows.shape[0]} rows")
