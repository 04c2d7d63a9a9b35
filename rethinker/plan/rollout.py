"""Memory of the rollout engine on one rank, and how many sequences it advances at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rethinker.config import Config
from rethinker.plan.batches import kv_bytes_per_token
from rethinker.plan.memory import GIB, Term, weight_bytes
from rethinker.plan.shapes import Shape

CUDA_GRAPHS = 1.5 * GIB  # of vLLM, with what its kernels hold; assumed
_HF_BATCH = 64  # rollout.hf_engine.BATCH: sequences that one call of generate advances


@dataclass(frozen=True)
class Rollout:
    """What the engine takes of a rank's device."""

    terms: list[Term]  # while it samples
    weights: float  # of these, bytes that a weight sync needs
    cache_tokens: float  # tokens that the key-value cache holds
    cache_missing: float  # bytes that it lacks for a single sequence of the longest kind
    sequences_at_once: float  # of the longest kind, per engine
    most_sequences: int  # that the engine advances at once, whatever their length
    waves: int  # that an episode's responses take, at the longest
    sleeps: bool  # whether all of it is free while the policy trains


def rollout_of(config: Config, shape: Shape, ranks: int, memory: float | None) -> Rollout:
    """The engine that `rollout.backend` names.

    Args:
        memory: bytes of a rank's GPU; None on a CPU, where rollout.kv_cache_gb sizes the cache.
    """
    settings, b = config.rollout, weight_bytes(config)
    tp = settings.tensor_parallel_size
    longest = min(config.data.max_prompt_tokens + settings.max_new_tokens, shape.max_positions)
    engines = max(1, ranks // tp)
    sequences = math.ceil(config.train.episode_queries / engines) * settings.group_size
    if settings.backend in ("recorded", "server"):
        return Rollout([], 0.0, 0.0, 0.0, 0.0, 0, 0, True)
    if settings.backend == "hf":
        at_once = min(_HF_BATCH, sequences)
        terms = [
            Term("transformers' copy of the policy", b * shape.parameters, f"{b} bytes, whole on every rank"),
            Term("key-value cache", at_once * longest * kv_bytes_per_token(config, shape), f"{at_once} sequences"),
            Term("scores", at_once * settings.max_new_tokens * shape.vocabulary * 4, "fp32, every step's"),
        ]
        waves = math.ceil(sequences / at_once)
        return Rollout(terms, terms[0].bytes, at_once * longest, 0.0, at_once, at_once, waves, False)
    weights = b * shape.parameters / tp
    most = 512 if memory is None else 1024 if memory >= 70 * GIB else 256  # vLLM's max_num_seqs
    if memory is None:
        cache = settings.kv_cache_gb * GIB
        overhead = _working_memory(config, shape, 4096, most)
        terms = [Term("vLLM's weights", weights), Term("vLLM's key-value cache", cache, "rollout.kv_cache_gb")]
        terms.append(Term("vLLM's working memory", overhead, "estimated"))
    else:
        budget = settings.gpu_memory_utilization * memory
        batched = 16384 if memory >= 70 * GIB else 8192  # its max_num_batched_tokens
        overhead = _working_memory(config, shape, batched, most) + CUDA_GRAPHS
        cache = budget - weights - overhead
        terms = [
            Term("vLLM's weights", weights, f"{b} bytes / tensor_parallel_size"),
            Term("vLLM's working memory", overhead, "estimated"),
            Term("vLLM's key-value cache", max(0.0, cache), "rest of gpu_memory_utilization"),
        ]
    cache_tokens = max(0.0, cache) / kv_bytes_per_token(config, shape)
    missing = max(0.0, longest * kv_bytes_per_token(config, shape) - cache)
    at_once = min(most, cache_tokens / longest)
    waves = math.ceil(sequences / at_once) if at_once >= 1 else 0
    sleeps = memory is not None and settings.sleep
    return Rollout(terms, weights, cache_tokens, missing, at_once, most, waves, sleeps)


def _working_memory(config: Config, shape: Shape, batched: int, sequences: int) -> float:
    """The largest of what vLLM's profiling run meets: a layer on a full batch, the sampler, the vision tower.

    Estimated from the sizes of its tensors: gate, up and their product; four fp32 copies of the logits.
    """
    b, tp = weight_bytes(config), config.rollout.tensor_parallel_size
    layer = batched * b * (3 * shape.intermediate / tp + 6 * shape.hidden)
    sampler = sequences * shape.vocabulary * 4 * 4
    tokens = min(batched, config.data.max_prompt_tokens)
    seen = tokens * shape.merge**2 * b * (3 * shape.vision_intermediate + 6 * shape.vision_hidden)
    return max(layer, sampler, seen) + batched * shape.hidden * b
