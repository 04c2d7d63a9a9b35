"""The DeepSpeed configuration of a run: ZeRO-3, with the user's entries over it; and what is gathered at a time."""

from __future__ import annotations

from typing import Any

import torch

from rethinker.config import Config, ConfigError
from rethinker.runtime.distributed import Ranks


def zero3_settings(config: Config, ranks: Ranks) -> dict[str, Any]:
    """The DeepSpeed configuration, with `train.deepspeed` merged over it."""
    settings: dict[str, Any] = {
        # Micro-batches differ in number from step to step, so the step's end is ours to say.
        "managed_gradient_accumulation": False,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.train.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.policy.dtype == "bfloat16"},
        # Micro-batches add up in fp32: bf16 would lose what is small beside the sum so far.
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": ranks.device.type == "cuda",
            "contiguous_gradients": True,
            "reduce_bucket_size": 500_000_000 if ranks.device.type == "cuda" else 5_000_000,
            "stage3_prefetch_bucket_size": 50_000_000 if ranks.device.type == "cuda" else 500_000,
            "stage3_param_persistence_threshold": 100_000 if ranks.device.type == "cuda" else 0,
        },
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    merged = _merge(settings, config.train.deepspeed)
    part = merged["zero_optimization"].get("zero_hpz_partition_size", 1)
    if ranks.world_size % max(1, min(part, ranks.world_size)):
        raise ConfigError(
            f"train.deepspeed.zero_optimization.zero_hpz_partition_size={part} must divide the number of ranks "
            f"({ranks.world_size}): give the GPUs of a node"
        )
    return merged


def reference_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a reference policy beside the one of `zero3_settings`.

    No optimizer; and no hpZ, whose groups of ranks DeepSpeed makes once in a process.
    """
    zero = {name: value for name, value in settings["zero_optimization"].items() if name != "zero_hpz_partition_size"}
    kept = {name: value for name, value in settings.items() if name not in ("optimizer", "gradient_clipping")}
    return kept | {"zero_optimization": zero}


def gather_whole_layers(model: torch.nn.Module) -> None:
    """Let ZeRO-3 gather a decoder layer's weights together, with no hooks inside the layer, which is then compiled.

    Args:
        model: with `hf.model.language_model.layers`, not yet under DeepSpeed.
    """
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(model, list({type(layer) for layer in model.hf.model.language_model.layers}))


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        merged[key] = _merge(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
    return merged
