"""Tile sizes of every kernel: fixed choices, nothing is tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from rethinker_kernels.devices import processors


@dataclass(frozen=True)
class Tiles:
    """Row kernels read [depth, lanes] logits at a time; each lane keeps a running maximum over its `depth` entries."""

    depth: int = 4
    lane_bytes: int = 2048  # of logits in one of the `depth` lines: as many bytes in flight in 16 bits as in 32
    gradient: int = 2048  # columns a row kernel writes at a time
    warps: int = 4
    scaled: int = 2048  # numbers that a program of the scaling kernel takes
    few: int = 1  # fewer rows than this do not fill the processors: each is read and written twice as wide
    programs: int = 1  # fewer rows than this are split over several programs each

    def of_rows(self, rows: int) -> Tiles:
        """For so many rows."""
        if rows >= self.few:
            return self
        return replace(self, lane_bytes=2 * self.lane_bytes, gradient=2 * self.gradient, warps=2 * self.warps)


GPU = Tiles()
"""Of bf16 logits on an H200, rows of 4 to 32 warps: the fastest forward, and no gradient slower by more than 2%."""

# Small, so that the interpreter's tests cross the borders of tiles at small sizes.
INTERPRETER = Tiles(depth=4, lane_bytes=256, gradient=512, scaled=64, few=7, programs=3)

MAX_SPLITS = 64
"""Programs per row at most; the combining kernel reads as many partial results at once."""


def tiles(device: torch.device) -> Tiles:
    """Those of this device."""
    return _of_gpu(processors(device)) if device.type == "cuda" else INTERPRETER


@cache
def _of_gpu(processors: int) -> Tiles:
    return replace(GPU, few=8 * processors, programs=2 * processors)
