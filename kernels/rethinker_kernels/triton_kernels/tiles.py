"""Tile sizes of every kernel, by GPU architecture: fixed choices, nothing is tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Tiles:
    """Row kernels read [depth, lanes] logits at a time; each lane keeps a running maximum over its `depth` entries."""

    depth: int = 4
    lanes: int = 2048
    gradient: int = 4096  # columns a row kernel writes at a time
    row_warps: int = 8
    tokens: int = 256  # rows of vectors [R] that a program takes at a time
    token_warps: int = 4
    group: int = 128  # rewards of a group that a program takes at a time
    programs: int = 1  # fewer rows than this are split over several programs each


BY_ARCHITECTURE = {
    80: Tiles(programs=2 * 108),
    90: Tiles(programs=2 * 132),
    100: Tiles(programs=2 * 148),
}

# Small, so that the interpreter's tests cross the borders of tiles at small sizes.
INTERPRETER = Tiles(depth=4, lanes=128, gradient=1024, tokens=8, group=4, programs=3)

MAX_SPLITS = 64
"""Programs per row at most; the combining kernel reads as many partial results at once."""


def tiles(device: torch.device) -> Tiles:
    """The entry of this device's architecture, or of the newest one below it."""
    return _of_device(device.index or 0) if device.type == "cuda" else INTERPRETER


@cache
def _of_device(index: int) -> Tiles:
    major, minor = torch.cuda.get_device_capability(index)
    known = [capability for capability in BY_ARCHITECTURE if capability <= 10 * major + minor]
    return BY_ARCHITECTURE[max(known, default=min(BY_ARCHITECTURE))]
