"""How hard the machine works: model FLOP utilisation and peak memory."""

from __future__ import annotations

import resource

import torch

from rethinker.families import family_of
from rethinker.runtime.distributed import Ranks

# Dense bf16 peak in FLOP/s, from the vendors' data sheets, by a part of torch.cuda.get_device_name().
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12, "A800": 312e12, "L40": 181e12}


def model_flops_utilization(model: torch.nn.Module, tokens: float, seconds: float, ranks: Ranks) -> float | None:
    """6 FLOP per parameter and token (forward and backward) over what the ranks' GPUs could do.

    A frozen parameter has no gradient: 4. The vision tower and attention scores are left out, as is usual. None where
    the peak is unknown, as on CPU.
    """
    if ranks.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(ranks.device)
    peak = next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
    if peak is None:
        return None
    parts = family_of(model.config.model_type).language_model(model).parameters()
    flop = sum((6 if p.requires_grad else 4) * getattr(p, "ds_numel", p.numel()) for p in parts)
    return flop * tokens / (seconds * peak * ranks.world_size)


def peak_memory_gb() -> float:
    """Most memory this rank has held so far, GiB: of the GPU, or of the process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB
