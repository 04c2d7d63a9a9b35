"""The DeepSpeed configuration of a run: ZeRO-3 with this project's sizes, and the user's entries over them."""

from __future__ import annotations

from typing import Any

from rethinker.config import Config, ConfigError
from rethinker.settings import joined


def deepspeed_config(config: Config, world_size: int, on_gpu: bool) -> dict[str, Any]:
    """The DeepSpeed configuration, with `train.deepspeed` merged over it; sizes are in elements.

    Raises:
        ConfigError: hpZ's groups of ranks do not divide the ranks.
    """
    settings: dict[str, Any] = {
        # Micro-batches differ in number from step to step, so the engine says where a step ends.
        "managed_gradient_accumulation": False,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.train.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.policy.dtype == "bfloat16"},
        # Micro-batches add up in fp32: bf16 would lose what is small beside the sum so far. And what transformers and
        # vLLM keep in fp32 stays so: RoPE's frequencies in bf16 would turn late tokens by radians too much.
        "data_types": {"grad_accum_dtype": "fp32", "keep_in_fp32_modules": ["inv_freq", "e_score_correction_bias"]},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": on_gpu,
            "contiguous_gradients": True,
            "reduce_bucket_size": 500_000_000 if on_gpu else 5_000_000,
            "stage3_prefetch_bucket_size": 50_000_000 if on_gpu else 500_000,
            "stage3_param_persistence_threshold": 100_000 if on_gpu else 0,
        },
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    merged = joined(settings, config.train.deepspeed)
    part = merged["zero_optimization"].get("zero_hpz_partition_size", 1)
    if world_size % max(1, min(part, world_size)):
        raise ConfigError(
            f"train.deepspeed.zero_optimization.zero_hpz_partition_size={part} must divide the number of ranks "
            f"({world_size}): give the GPUs of a node"
        )
    return merged


def without_optimizer(settings: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a reference policy beside a trained one: also without hpZ, whose groups of ranks DeepSpeed
    makes once in a process."""
    kept = {name: value for name, value in settings.items() if name not in ("optimizer", "gradient_clipping")}
    return kept | {"zero_optimization": settings["zero_optimization"] | {"zero_hpz_partition_size": 1}}
