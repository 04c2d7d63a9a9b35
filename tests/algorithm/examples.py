"""Small groups, samples and packed batches for the tests of the algorithm."""

from __future__ import annotations

import itertools

import torch

from rethinker.algorithm.replay import ReplayBuffer
from rethinker.algorithm.selection import Batch, select_batch
from rethinker.config import AlgorithmConfig, Config, TrainConfig
from rethinker.samples import Completion, Group, PackedBatch, Query, Rethought, Sample


def completion(length: int = 2, rethought: Rethought | None = None) -> Completion:
    """A response whose forced tokens, if any, have NaN log-probs, as the rollout leaves them."""
    logprobs = [-0.1 * (i + 1) for i in range(length)]
    if rethought is not None:
        for i in range(rethought.trigger_start, rethought.trigger_end):
            logprobs[i] = float("nan")
    return Completion(list(range(length)), logprobs, "text", "stop", rethought)


def group(rewards: list[float], name: str = "q", version: int = 0) -> Group:
    """One query with a response per reward; advantages are not assigned yet."""
    return Group(Query(name, "?", "!"), [completion() for _ in rewards], version, rewards=list(rewards))


def sample(
    advantage: float, name: str = "q", version: int = 0, length: int = 2, rethought: Rethought | None = None
) -> Sample:
    return Sample(Query(name, "?", "!"), completion(length, rethought), advantage, version)


def select(
    groups: list[Group], *, name: str, pairs: int, replay: ReplayBuffer, progress: float = 0.0, **limits
) -> Batch:
    """`select_batch` with these settings; `limits` are max_advantage and mask_truncated."""
    masked = limits.pop("mask_truncated", False)
    config = Config(algorithm=AlgorithmConfig(name=name, **limits))
    config.train = TrainConfig(batch_pairs=pairs, mask_truncated=masked)
    return select_batch(groups, replay, config, progress)


def packed(samples: list[Sample]) -> PackedBatch:
    """The part of a packed batch that the objective reads; model inputs are left empty."""
    lengths = [len(s.completion.token_ids) for s in samples]
    nothing = torch.zeros(0, dtype=torch.int64)
    return PackedBatch(
        input_ids=nothing[None],
        position_ids=nothing[None, None].expand(3, 1, 0),
        prompt_id=nothing,
        response_id=nothing,
        given=nothing.bool(),
        source_index=nothing,
        target_ids=torch.tensor([t for s in samples for t in s.completion.token_ids], dtype=torch.int64),
        old_logps=torch.tensor([x for s in samples for x in s.completion.logprobs], dtype=torch.float64),
        advantages=torch.tensor([s.advantage for s in samples], dtype=torch.float64),
        weights=torch.tensor([s.weight for s in samples for _ in s.completion.token_ids], dtype=torch.float64),
        age=torch.zeros(len(samples), dtype=torch.int64),
        loss_mask=torch.tensor([m & (s.weight != 0) for s in samples for m in s.completion.trainable]).bool(),
        cu_seqlens=torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
        image_inputs={},
    )
