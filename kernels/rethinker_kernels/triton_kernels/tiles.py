"""Tile sizes of the row kernels: fixed choices, nothing is tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rethinker_kernels.devices import processors


@dataclass(frozen=True)
class Tiles:
    """Row kernels read [depth, lanes] logits at a time; each lane keeps a running maximum over its `depth` entries."""

    depth: int
    lane_bytes: int  # of logits in one of the `depth` lines: as many bytes in flight in 16 bits as in 32
    gradient: int  # columns a row kernel writes at a time
    warps: int


GPU = Tiles(depth=4, lane_bytes=2048, gradient=2048, warps=4)
"""Of bf16 logits on an H200, rows of 4 to 32 warps: the fastest forward, and no gradient slower by more than 2%."""

INTERPRETER, FEW = Tiles(depth=4, lane_bytes=256, gradient=512, warps=4), 7
"""Small, so that the interpreter's tests cross the borders of tiles at small sizes."""


def tiles(device: torch.device, rows: int) -> Tiles:
    """For so many rows: few do not fill the processors, and each is read and written twice as wide."""
    own, few = (GPU, 8 * processors(device)) if device.type == "cuda" else (INTERPRETER, FEW)
    if rows >= few:
        return own
    return Tiles(own.depth, 2 * own.lane_bytes, 2 * own.gradient, 2 * own.warps)
