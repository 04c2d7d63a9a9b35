"""Checksums by which policy and rollout engine compare a tensor that they do not share."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Checksum:
    """SHA-256 of a tensor's bytes as one type, and its length along the first dimension."""

    sha256: str
    rows: int


def checksum(tensor: torch.Tensor, dtype: torch.dtype) -> Checksum:
    """Checksum of a tensor as `dtype`, in row-major order, whatever its device."""
    flat = tensor.detach().to(dtype).cpu().contiguous().view(-1)
    return Checksum(hashlib.sha256(flat.view(torch.uint8).numpy()).hexdigest(), len(tensor))
