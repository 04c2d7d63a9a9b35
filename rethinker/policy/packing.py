"""Shared-prompt packing: lay the responses of a query behind one copy of its prompt, and share the work among ranks.

One row reads `[prompt][r1][r2]..[rG] [next prompt]..`. Every response starts at the same position (the prompt's largest
plus 1); its first token is predicted by the prompt's last token, and its last token is a label only, never an input.
Images that an environment showed stand in the response where the policy saw them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from rethinker.algorithm.corrections import token_weights
from rethinker.config import AlgorithmConfig
from rethinker.samples import Bundle, Completion, PackedBatch, Prompt, Query, Sample

PADDING = 0  # any ordinary token id
# By the model's names for them; empty without images.
ImageInputs = dict[str, torch.Tensor]
# (prompt, its image inputs) -> [3, P] under M-RoPE, else [1, P]
PromptPositions = Callable[[Prompt, ImageInputs], torch.Tensor]


def plan_micro_batches(samples: list[Sample], *, budget: int, world_size: int) -> list[list[list[Bundle]]]:
    """Divide a global batch into micro-batches: `[rank][micro-batch][bundle]`, the same number on every rank.

    Samples of one query share a bundle wherever they came from (fresh or replayed), unless they exceed `budget` tokens
    together; then they are split and each part repeats the prompt. Longest first, each bundle goes to the emptiest
    micro-batch, so ranks finish together. The plan depends on the samples alone: every rank computes the same one.

    Args:
        samples: the whole batch over all ranks; `prompt_tokens` must be set.
        budget: most tokens in a micro-batch (train.micro_batch_tokens); a single longer sample still gets its own.
        world_size: ranks to share among. A rank may get empty micro-batches; it runs them as padding.
    """
    by_query: dict[str, list[Sample]] = {}
    for sample in samples:
        by_query.setdefault(sample.query.id, []).append(sample)
    bundles = [bundle for group in by_query.values() for bundle in _split(group, budget)]
    bundles.sort(key=lambda bundle: -bundle.tokens)  # stable: ties keep the order of the batch
    rounds = max(1, -(-sum(b.tokens for b in bundles) // (budget * world_size)))
    while True:
        bins: list[list[Bundle]] = [[] for _ in range(rounds * world_size)]
        load = [0] * len(bins)
        for bundle in bundles:
            emptiest = min(range(len(bins)), key=load.__getitem__)
            bins[emptiest].append(bundle)
            load[emptiest] += bundle.tokens
        if all(tokens <= budget or len(held) == 1 for tokens, held in zip(load, bins, strict=True)):
            return [[bins[i * world_size + rank] for i in range(rounds)] for rank in range(world_size)]
        rounds += 1


def _split(group: list[Sample], budget: int) -> list[Bundle]:
    """Cut one query's samples into bundles of at most `budget` tokens (at least one sample each)."""
    parts: list[list[Sample]] = [[]]
    prompt = used = group[0].prompt_tokens
    for sample in group:
        if parts[-1] and used + sample.input_tokens > budget:
            parts.append([])
            used = prompt
        parts[-1].append(sample)
        used += sample.input_tokens
    return [Bundle(part[0].query, tuple(part)) for part in parts]


def pack(
    bundles: list[Bundle],
    encode: Callable[[Query], Prompt],
    pixels: Callable[[Query], ImageInputs],
    positions: PromptPositions,
    *,
    policy_version: int = 0,
    algorithm: AlgorithmConfig | None = None,
    nll_weight: float = 0.0,
) -> PackedBatch:
    """Lay out one micro-batch.

    Args:
        bundles: what `plan_micro_batches` gave this rank; an empty list makes a two-token row of weight 0.
        encode, pixels: from data.prompts.PromptEncoder.
        positions: a prompt's positions, from the policy's model: `Policy.positions`.
        policy_version: the current one, for each sample's age.
        algorithm: the settings by which tokens are weighted (corrections.py); by default each has its sample's weight.
        nll_weight: factor of the supervised term on tokens of rethought responses.
    """
    # Of every prompt and response: its tokens, their positions, which of them were given (not sampled), the prompt's
    # number, the response's (0: the prompt).
    inputs: list[tuple[np.ndarray, torch.Tensor, np.ndarray, int, int]] = []
    # Of every response with a token: source, targets, old log-probs, weights, loss mask, nll weights, [L] each.
    labels: list[tuple[np.ndarray, ...]] = []
    experts: list[np.ndarray] = []  # of every prompt and response, with rollout.router_replay
    image_parts: list[ImageInputs] = []
    row = 0  # tokens so far
    for number, bundle in enumerate(bundles):
        prompt, images = encode(bundle.query), pixels(bundle.query)
        if len(prompt.token_ids) != bundle.samples[0].prompt_tokens:
            raise RuntimeError(
                f"query {bundle.query.id!r} had {bundle.samples[0].prompt_tokens} prompt tokens in the rollout and has "
                f"{len(prompt.token_ids)} now: its image changed, or data.min_pixels / data.max_pixels differ"
            )
        places = positions(prompt, images)
        start = int(places.max()) + 1
        inputs.append((np.asarray(prompt.token_ids), places, np.ones(len(prompt.token_ids), bool), number, 0))
        image_parts.append(images)
        row += len(prompt.token_ids)
        last = row - 1
        # A prompt that several policies answered is read as the latest of them read it.
        latest = max(bundle.samples, key=lambda sample: sample.policy_version).completion
        if latest.experts is not None:
            experts.append(latest.experts[: len(prompt.token_ids)])
        for r, sample in enumerate(bundle.samples, start=1):
            completion, L = sample.completion, sample.completion.tokens
            if L == 0:
                continue
            if completion.images:
                shown = pixels(replace(bundle.query, images=completion.images))
                image_parts.append(shown)
                whole = replace(prompt, token_ids=prompt.token_ids + completion.token_ids[:-1].tolist())
                places = positions(whole, joined([images, shown]))[:, len(prompt.token_ids) :]
            else:
                places = torch.arange(start, start + L - 1).expand(len(places), -1)
            inputs.append((completion.token_ids[:-1], places, ~completion.sampled[:-1], number, r))
            if completion.experts is not None:
                experts.append(completion.experts[len(prompt.token_ids) :])
            source = np.arange(row - 1, row + L - 1)
            source[0] = last
            row += L - 1
            old, factor = _behaviour(completion, algorithm or AlgorithmConfig())
            mask = completion.trainable & (sample.weight != 0)
            nll = np.full(L, nll_weight if completion.supervised else 0.0)
            labels.append((source, completion.token_ids, old, sample.weight * factor, mask, nll))
    samples = [sample for bundle in bundles for sample in bundle.samples]
    lengths = [sample.completion.tokens for sample in samples]
    if not labels:  # nothing to train on: a row that only keeps the ranks' collectives in step
        token, zero = np.array([PADDING]), np.zeros(1)
        places = positions(Prompt("", [PADDING] * 2, [PADDING] * 2, []), {})
        inputs = [(token, places[:, :1], np.ones(1, bool), 0, 0), (token, places[:, 1:], np.zeros(1, bool), 0, 1)]
        labels = [(np.array([0]), token, zero, zero, np.zeros(1, bool), zero)]
        samples, lengths, image_parts, experts = [], [1], [], []
    ids, places, given, prompt_id, response_id = zip(*inputs, strict=True)
    source, targets, old, weights, mask, nll = zip(*labels, strict=True)
    counts = torch.tensor([len(part) for part in ids])
    return PackedBatch(
        input_ids=_joined(ids, np.int64)[None],
        position_ids=torch.cat(places, dim=1)[:, None],
        prompt_id=torch.tensor(prompt_id).repeat_interleave(counts),
        response_id=torch.tensor(response_id).repeat_interleave(counts),
        given=_joined(given, np.bool_),
        source_index=_joined(source, np.int64),
        target_ids=_joined(targets, np.int64),
        old_logps=_joined(old, np.float32),
        advantages=torch.tensor([s.advantage for s in samples] or [0.0], dtype=torch.float32),
        weights=_joined(weights, np.float32),
        age=torch.tensor([policy_version - s.policy_version for s in samples] or [0]),
        loss_mask=_joined(mask, np.bool_),
        nll_weights=_joined(nll, np.float32) if nll_weight else None,
        experts=torch.from_numpy(np.concatenate(experts).astype(np.int16)) if experts else None,
        cu_seqlens=torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
        image_inputs=joined(image_parts),
    )


def joined(parts: list[ImageInputs]) -> ImageInputs:
    """The images of several prompts as one; prompts without images may be among them."""
    parts = [part for part in parts if part]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}


def _joined(parts: Sequence[np.ndarray], dtype: type) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts, dtype=dtype, casting="same_kind"))


def _behaviour(completion: Completion, algorithm: AlgorithmConfig) -> tuple[np.ndarray, np.ndarray]:
    """[L] each: the log-prob the ratio is taken against, and what multiplies the token's loss.

    With a rollout correction the ratio is taken against the trainer's log-probs. Where these, or those of the rollout,
    are not finite, it is NaN, and so is the loss.
    """
    weights = token_weights(completion, algorithm)
    if algorithm.rollout_correction is None:
        return completion.logprobs, weights
    return np.where(np.isnan(weights), np.float32(np.nan), completion.trainer_logprobs), weights
