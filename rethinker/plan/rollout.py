"""Memory of the rollout engine on one rank, and how many sequences it advances at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rethinker.config import Config
from rethinker.plan.memory import GIB, Term, weight_bytes
from rethinker.plan.shapes import Shape
from rethinker.rollout import hf_engine

CUDA_GRAPHS = 1.5 * GIB  # of vLLM, with what its kernels hold; assumed


@dataclass(frozen=True)
class Rollout:
    """What the engine takes of a rank's device."""

    terms: list[Term]  # while it samples; the first are the weights, which a weight sync needs
    cache_tokens: float = 0.0  # tokens that the key-value cache holds
    cache_missing: float = 0.0  # bytes that it lacks for a single sequence of the longest kind
    sequences_at_once: float = 0.0  # of the longest kind, per engine
    most_sequences: int = 0  # that the engine advances at once, whatever their length
    waves: int = 0  # that an episode's responses take, at the longest
    sleeps: bool = False  # whether all of it is free while the policy trains


def rollout_of(config: Config, shape: Shape, ranks: int, memory: float | None) -> Rollout:
    """The engine that `rollout.backend` names.

    Args:
        memory: bytes of a rank's GPU; None on a CPU, where rollout.kv_cache_gb sizes the cache.
    """
    settings, b, tp = config.rollout, weight_bytes(config), config.rollout.tensor_parallel_size
    token = kv_bytes_per_token(config, shape)
    longest = min(config.data.max_prompt_tokens + settings.max_new_tokens, shape.text.max_position_embeddings)
    sequences = math.ceil(config.train.episode_queries / max(1, ranks // tp)) * settings.group_size
    if settings.backend in ("recorded", "server"):
        return Rollout([])
    if settings.backend == "hf":
        most = min(hf_engine.BATCH, sequences)
        terms = [
            Term("transformers' copy of the policy", b * shape.parameters, f"{b} bytes, whole on every rank"),
            Term("key-value cache", most * longest * token, f"{most} sequences"),
            Term("scores", most * settings.max_new_tokens * shape.vocabulary * 4, "fp32, every step's"),
        ]
        return Rollout(terms, most * longest, 0.0, most, most, math.ceil(sequences / most))
    # vLLM's defaults: max_num_seqs, and max_num_batched_tokens of its profiling run.
    large = memory is not None and memory >= 70 * GIB
    most, batched = (512, 4096) if memory is None else (1024, 16384) if large else (256, 8192)
    weights = b * shape.parameters / tp
    # The larger of what the profiling run meets, from the sizes of its tensors: a layer's gate, up and their product on
    # a full batch; four fp32 copies of the logits.
    layer = batched * b * (3 * shape.text.intermediate_size / tp + 6 * shape.hidden)
    working = max(layer, most * shape.vocabulary * 4 * 4) + batched * shape.hidden * b
    if memory is None:
        cache, source = settings.kv_cache_gb * GIB, "rollout.kv_cache_gb"
    else:
        working += CUDA_GRAPHS
        cache = settings.gpu_memory_utilization * memory - weights - working
        source = "rest of gpu_memory_utilization"
    terms = [
        Term("vLLM's weights", weights, f"{b} bytes / tensor_parallel_size"),
        Term("vLLM's working memory", working, "estimated"),
        Term("vLLM's key-value cache", max(0.0, cache), source),
    ]
    at_once = min(most, max(0.0, cache) / token / longest)
    return Rollout(
        terms,
        cache_tokens=max(0.0, cache) / token,
        cache_missing=max(0.0, longest * token - cache),
        sequences_at_once=at_once,
        most_sequences=most,
        waves=math.ceil(sequences / at_once) if at_once >= 1 else 0,
        sleeps=memory is not None and settings.sleep,
    )


def kv_bytes_per_token(config: Config, shape: Shape) -> float:
    """Keys and values of a token in one rank's cache; heads are divided among the ranks of an engine, not below one."""
    heads = max(1, shape.text.num_key_value_heads / config.rollout.tensor_parallel_size)
    return 2 * shape.text.num_hidden_layers * heads * shape.head_dim * weight_bytes(config)
