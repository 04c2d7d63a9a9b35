"""ZeRO-3's optimizer as files, one per rank, that any number of ranks reads back: fp32 weights and AdamW's moments.

Every parameter lies flat, in equal pieces over the ranks, the last ones padded; each rank writes its piece.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

MOMENTS = ("exp_avg", "exp_avg_sq")


def applied_steps(zero: Any) -> int:
    """Steps that AdamW has seen, of DeepSpeed's optimizer; a skipped one, or one without samples, is none of them."""
    return next((int(state["step"]) for state in zero.optimizer.state.values()), 0)


def snapshot(model: nn.Module, zero: Any, rank: int) -> Callable[[Path], None]:
    """This rank's pieces, of DeepSpeed's stage 3 optimizer, as they are now; what comes back writes them."""
    state = {f"{kind}.{name}": piece.to("cpu", copy=True) for kind, name, _, piece in _pieces(model, zero)}

    def write(folder: Path) -> None:
        save_file(state, folder / f"optimizer_{rank:05d}.safetensors")

    return write


def load(model: nn.Module, zero: Any, folder: Path, adam_steps: int, rank: int) -> None:
    """Continue with the optimizer whose files lie in a folder.

    Args:
        model, zero: DeepSpeed's stage 3 optimizer over a model whose weights have been loaded.
        folder: with a file from every rank of the run that wrote them.
        adam_steps: `applied_steps` of that run.
    """
    with parts_of(folder, "optimizer") as files:
        if adam_steps:
            for flat in zero.fp32_partitioned_groups_flat:
                moments = {name: torch.zeros_like(flat) for name in MOMENTS}
                zero.optimizer.state[flat] = {"step": torch.tensor(float(adam_steps)), **moments}
        for kind, name, numel, piece in _pieces(model, zero):
            parts = [file.get_slice(f"{kind}.{name}") for file in files]
            piece.copy_(repartitioned(parts, numel, piece.numel(), rank))


def _pieces(model: nn.Module, zero: Any) -> Iterator[tuple[str, str, int, torch.Tensor]]:
    """(kind, parameter, its size, this rank's flat piece with its padding), views of what the optimizer works on."""
    kinds = {"fp32": None} | ({name: name for name in MOMENTS} if zero.optimizer.state else {})
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            numel = math.prod(parameter.ds_shape)
            for kind, key in kinds.items():
                yield kind, name, numel, zero.get_local_fp32_param(parameter, key).detach()


@contextmanager
def parts_of(folder: Path, kind: str) -> Iterator[list[Any]]:
    """The files `<kind>_<rank>.safetensors` of a folder, open, in the order of the ranks that wrote them."""
    with ExitStack() as stack:
        yield [stack.enter_context(safe_open(path, framework="pt")) for path in sorted(folder.glob(f"{kind}_*"))]


def repartitioned(parts: list[Any], total: int, length: int, rank: int) -> torch.Tensor:
    """This rank's piece of a flat tensor that lies in equal parts in other ranks' files.

    Args:
        parts: slices (safetensors) of equal length; the last ones are padded beyond `total` elements.
        length: elements of the piece; those beyond `total` are padding.
    """
    per_part = parts[0].get_shape()[0]
    start, end = rank * length, min((rank + 1) * length, total)
    piece = torch.zeros(length)
    while start < end:
        part, offset = divmod(start, per_part)
        taken = min(per_part - offset, end - start)
        piece[start - rank * length :][:taken] = parts[part][offset : offset + taken]
        start += taken
    return piece
