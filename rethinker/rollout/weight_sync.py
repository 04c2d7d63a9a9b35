"""The trainer's half of a weight sync with vLLM: a watched stream of tensors, cut into buckets, and checksums.

vllm_weights.py is the other half, in the trainer's process (vllm_engine.py) or in a server's (server/worker.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator

import torch

from rethinker.rollout.deadline import Deadline
from rethinker.rollout.engine import WeightStream

# Tensors are copied when they leave the stream (it may reuse their memory) and live until their layer is loaded.
BUCKET_BYTES = 256 << 20
Checksum = tuple[str, int]
"""SHA-256 of a tensor's bytes as one type, and its length along the first dimension."""


def checksum(tensor: torch.Tensor, dtype: torch.dtype) -> Checksum:
    """Checksum of a tensor as `dtype`, in row-major order, whatever its device."""
    flat = tensor.detach().to(dtype).cpu().contiguous().view(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy()).hexdigest(), len(tensor)


def watched(
    weights: WeightStream, deadline: Deadline, checksums: dict[str, Checksum] | None, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """The stream's tensors, while the deadline is watched; `checksums`, if given, gets theirs as `dtype`."""
    for name, tensor in weights:
        deadline.check(f"at {name}")
        if checksums is not None:
            checksums[name] = checksum(tensor, dtype)
        yield name, tensor


def send_in_buckets(
    names: list[str],
    tensors: Iterable[tuple[str, torch.Tensor]],
    load: Callable[[list[tuple[str, torch.Tensor]]], None],
    finish: Callable[[], None],
) -> None:
    """Copy tensors into buckets of about BUCKET_BYTES, `load` each, and `finish`.

    Raises:
        RuntimeError: a tensor of `names` did not come; nothing stands in its place.
    """
    bucket: list[tuple[str, torch.Tensor]] = []
    size, lost = 0, set(names)
    for name, tensor in tensors:
        bucket.append((name, tensor.detach().clone()))
        lost.discard(name)
        size += tensor.nbytes
        if size >= BUCKET_BYTES:
            load(bucket)
            bucket, size = [], 0
    if bucket:
        load(bucket)
    finish()
    if lost:
        raise RuntimeError(f"weight sync: {len(lost)} announced tensors did not come, the first {min(lost)}")
