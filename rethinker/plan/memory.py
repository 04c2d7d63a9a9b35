"""Memory of one rank: what stays between training steps, what a step adds, and what the rollout engine takes.

A budget is {what: bytes}.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rethinker.config import Config, ConfigError, one_line
from rethinker.plan.model import Shape
from rethinker.plan.step import MicroBatch, count_step
from rethinker.policy.zero3 import deepspeed_config
from rethinker.rollout import hf_engine
from rethinker_kernels.chunks import CPU_LOGITS_BYTES, chunk_bytes

GIB = 2**30
H100_PROCESSORS = 132  # the loss head's chunks depend on them; other GPUs' differ by a few percent
CUDA_GRAPHS = 1.5 * GIB  # of vLLM, with what its kernels hold; assumed
VLLM_WEIGHTS = "vLLM's weights"

Budget = dict[str, float]


def total(budget: Budget) -> float:
    """Bytes of a budget."""
    return sum(budget.values())


def zero3(config: Config, ranks: int, on_gpu: bool) -> Any:
    """DeepSpeed's ZeRO settings of a run.

    Raises:
        ConfigError: train.deepspeed holds what DeepSpeed does not take.
    """
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        return DeepSpeedZeroConfig(**deepspeed_config(config, ranks, on_gpu)["zero_optimization"])
    except ValueError as error:
        raise ConfigError(f"train.deepspeed.zero_optimization: {one_line(error)}") from error


def _on_host(part: Any) -> bool:
    """Whether an `offload_*` section of DeepSpeed's moves its part to the host."""
    return part is not None and part.device != "none"


def training_state(config: Config, shape: Shape, ranks: int, on_gpu: bool) -> tuple[Budget, Budget]:
    """What a rank holds between steps: (on its device, offloaded to the host)."""
    zero, b, trained = zero3(config, ranks, on_gpu), shape.weight_bytes, shape.trained / ranks
    parameters = {"parameters": b * (shape.parameters + shape.adapters) / ranks}
    # An fp32 policy is not its own master: DeepSpeed compares a torch.device with a text and copies (measured).
    optimizer = {"gradients": 4 * trained, "fp32 master weights": 4 * trained, "AdamW moments": 8 * trained}
    device, host = {"gradient bucket": b * zero.reduce_bucket_size}, {}
    if (sharing := min(zero.zero_hpz_partition_size, ranks)) > 1:
        device["the node's copy of the weights"] = b * shape.parameters / sharing
    if config.algorithm.kl_coef > 0 and not shape.adapters:
        device["reference policy"] = b * shape.parameters / ranks
    if _on_host(zero.offload_optimizer):
        optimizer["fp32 gradients"] = 4 * trained
    for part, away in ((parameters, zero.offload_param), (optimizer, zero.offload_optimizer)):
        (host if _on_host(away) else device).update(part)
    return device, host


def step_peak(config: Config, shape: Shape, batch: MicroBatch, ranks: int, on_gpu: bool) -> Budget:
    """What a step adds at its worst moment: of a micro-batch, or of the optimizer."""
    zero, b, head = zero3(config, ranks, on_gpu), shape.weight_bytes, shape.head
    V, D = head.shape
    chunk = chunk_bytes(batch.rows, D, V, b, H100_PROCESSORS if on_gpu else 0)
    if not on_gpu:  # fp32 copies of a part: of factors of 16 bits, and those that a CPU's functions work on
        chunk += max(CPU_LOGITS_BYTES if b < 4 else 0, 2 * min(chunk, CPU_LOGITS_BYTES))
    step = count_step(shape, batch, chunk=chunk, bucket=zero.reduce_bucket_size)
    if ranks > 1:  # the head, and what is prefetched or kept for its next use
        used = max(head.numel(), min(zero.max_reuse_distance / 2, shape.parameters))
        step["gathered weights"] = b * (used + min(zero.prefetch_bucket_size, shape.parameters))
    # A sub-group ends with the parameter that fills it. It takes an fp32 gradient, and AdamW's temporaries: one on a
    # GPU (foreach), two on a CPU.
    group = min(shape.trained, zero.sub_group_size * ranks + head.numel()) / ranks
    optimizer = {} if _on_host(zero.offload_optimizer) else {"optimizer step": group * (8 if on_gpu else 12)}
    return max(step, optimizer, key=total)


def sync_peak(shape: Shape) -> Budget:
    """What a weight sync adds: gathered weights, and full tensors on their way to vLLM."""
    b = shape.weight_bytes
    return {
        "gathered weights": b * shape.largest_group,
        "copied tensors": b * shape.head.numel(),
        "a merged weight": (8 if b < 4 else 4) * shape.merged,  # in fp32, and rounded
    }


@dataclass(frozen=True)
class Rollout:
    """What the engine takes of a rank's device while it samples."""

    budget: Budget
    cache_tokens: float = 0.0  # that its key-value cache holds
    waves: int = 0  # that an episode's responses take at their longest; 0: the cache does not hold a single one
    sleeps: bool = False  # whether all of it is free while the policy trains


def rollout_of(config: Config, shape: Shape, ranks: int, memory: float | None) -> Rollout:
    """The engine that `rollout.backend` names; nothing if it is not in the trainer's processes.

    Args:
        memory: bytes of a rank's GPU; None on a CPU, where rollout.kv_cache_gb sizes the cache.
    """
    settings, tp, b, V, D = config.rollout, config.rollout.tensor_parallel_size, shape.weight_bytes, *shape.head.shape
    if settings.backend in ("recorded", "server"):
        return Rollout({})
    text = shape.text
    # Keys and values of a token; heads are divided among an engine's ranks, but none has less than one.
    token = 2 * b * sum(max(1, heads / tp) * size for heads, size in shape.policy.family.cached(text))
    state = shape.policy.family.state(text, b) / tp
    longest = min(config.data.max_prompt_tokens + settings.max_new_tokens, text.max_position_embeddings)
    sequences = math.ceil(config.train.episode_queries / (ranks // tp)) * settings.group_size
    if settings.backend == "hf":
        most = min(hf_engine.BATCH, sequences)
        budget = {
            "the engine's copy of the policy": b * shape.parameters,
            "key-value cache": most * (longest * token + state),
        }
        budget["scores of every step"] = most * settings.max_new_tokens * V * 4
        return Rollout(budget, most * longest, math.ceil(sequences / most))
    # vLLM's defaults: max_num_seqs, and max_num_batched_tokens of its profiling run.
    large = memory is not None and memory >= 70 * GIB
    most, batched = (512, 4096) if memory is None else (1024, 16384) if large else (256, 8192)
    # The larger of what the profiling run meets, from the sizes of its tensors: a layer's gate, up and their product on
    # a full batch; four fp32 copies of the logits.
    layer = batched * b * (3 * text.intermediate_size / tp + 6 * D)
    working = max(layer, most * V * 4 * 4) + batched * D * b + (0 if memory is None else CUDA_GRAPHS)
    weights, cache = b * shape.parameters / tp, settings.kv_cache_gb * GIB
    if memory is not None:
        cache = max(0.0, settings.gpu_memory_utilization * memory - weights - working)
    at_once = min(most, int(cache / (token * longest + state)))
    return Rollout(
        {VLLM_WEIGHTS: weights, "vLLM's working memory (estimated)": working, "vLLM's key-value cache": cache},
        cache / token,
        waves=math.ceil(sequences / at_once) if at_once else 0,
        sleeps=memory is not None and settings.sleep,
    )
