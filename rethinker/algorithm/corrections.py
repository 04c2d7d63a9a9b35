"""Token weights that are known before a step: rollout corrections, and the mask of tokens of low entropy.

`algorithm.rollout_correction` weights a response's tokens for having been sampled by the rollout engine, whose
probabilities are not quite the trainer's. With w_t = pi_trainer / pi_rollout of a sampled token:

    token_truncate       clamp(w_t, low, high)                     truncated importance sampling (Yao et al., 2025)
    token_mask           w_t if low <= w_t <= high else 0          IcePop (arXiv 2510.18855)
    sequence_truncate    clamp(W, low, high), W = prod_t w_t       of all tokens of the response
    sequence_mask        W if low <= W <= high else 0              masked importance sampling (Liu, Li et al., 2025)
    geometric_mask       1 if low <= W^(1/L) <= high else 0        the same authors' rejection by the mean log-ratio

`algorithm.top_entropy` leaves the policy gradient to the share of an episode's tokens with the highest entropy under
the policy that begins the episode (arXiv 2506.01939).

Legend: L tokens of one response.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rethinker.config import AlgorithmConfig
from rethinker.samples import Completion

if TYPE_CHECKING:
    from rethinker.runtime.distributed import Ranks

METRICS = ("correction_masked", "correction_truncated", "correction_ratio_max", "top_entropy_threshold")
"""What `weigh` returns, of the whole episode; null where it is off."""


def bounds(config: AlgorithmConfig) -> tuple[float, float]:
    """(low, high): within these the ratio of `algorithm.rollout_correction` stays as it is."""
    kind = config.rollout_correction
    high = config.correction_high or (1.01 if kind == "geometric_mask" else 2.0)
    default = 0.0 if kind.endswith("truncate") else 1 / high
    return default if config.correction_low is None else config.correction_low, high


def token_weights(completion: Completion, config: AlgorithmConfig) -> np.ndarray:
    """fp64 [L]: what multiplies each token's loss.

    A sampled token whose log-prob is not finite gets NaN, in a sequence's ratio all of its response: that stops the
    step, and is not to be clamped or masked into a plausible weight. Forced tokens get 1.
    """
    if config.rollout_correction is not None:
        weights = corrected(*_log_ratio(completion, config.rollout_correction), config)
    else:
        known = np.isfinite(completion.logprobs) | ~completion.sampled
        weights = np.where(known, 1.0, np.nan) if config.top_entropy is not None else np.ones(completion.tokens)
    if config.top_entropy is not None and completion.kept is not None:
        weights = weights * completion.kept
    return weights


def corrected(log_ratio: Tensor, is_sampled: Tensor, config: AlgorithmConfig) -> np.ndarray:
    """fp64 [L]: the weights of `algorithm.rollout_correction`, from log(pi_trainer / pi_rollout) [L] and bool [L]."""
    low, high = bounds(config)
    log_level = _level(log_ratio, is_sampled, config.rollout_correction)
    ratio = log_level.exp()  # may overflow to inf, which is above any bound
    if config.rollout_correction.endswith("truncate"):
        weights = ratio.clamp(low, high)
    else:
        inside = (ratio.double() >= low) & (ratio.double() <= high)
        kept = torch.ones_like(ratio) if config.rollout_correction == "geometric_mask" else ratio
        weights = torch.where(inside, kept, 0.0)
    weights = torch.where(log_level.isfinite(), weights, torch.nan)
    return torch.where(is_sampled, weights, 1.0).double().numpy()


def _log_ratio(completion: Completion, kind: str) -> tuple[Tensor, Tensor]:
    """[L] each: log(pi_trainer / pi_rollout), fp32 as the log-probs are, fp64 where it is summed; and whether the token
    was sampled."""
    assert completion.trainer_logprobs is not None, "PolicyEngine.score comes first"
    dtype = torch.float32 if kind.startswith("token") else torch.float64
    gap = torch.tensor(completion.trainer_logprobs, dtype=dtype) - torch.tensor(completion.logprobs, dtype=dtype)
    return gap, torch.from_numpy(completion.sampled)


def _level(log_ratio: Tensor, is_sampled: Tensor, kind: str) -> Tensor:
    """[L]: the log of the ratio that the bounds are about: of the token, or of its response."""
    if kind.startswith("token"):
        return log_ratio
    total = torch.where(is_sampled, log_ratio, 0.0).sum()
    if kind == "geometric_mask":
        total = total / is_sampled.sum().clamp(min=1)
    return total.expand(len(log_ratio))


def entropy_threshold(entropies: np.ndarray, share: float) -> float | None:
    """The entropy that the `share` of tokens with the highest ones have at least, rounded up to whole tokens; None
    without a token. Entropies that are not finite do not count."""
    entropies = entropies[np.isfinite(entropies)]
    if not len(entropies):
        return None
    place = len(entropies) - max(1, math.ceil(share * len(entropies)))
    return float(np.partition(entropies, place)[place])


def weigh(
    completions: Sequence[Completion], entropies: Sequence[np.ndarray], config: AlgorithmConfig, ranks: Ranks
) -> dict[str, float | None]:
    """Set `completion.kept` where `algorithm.top_entropy` asks for it; one collective.

    Args:
        completions: of the episode, scored: those that this rank holds.
        entropies: of the policy at each of their tokens, fp32 [L] each.
        config: `rollout_correction` with its bounds, and `top_entropy`.

    Returns:
        METRICS over the completions of all ranks, the same on every rank. Forced tokens have no part in the threshold;
        those of responses without an advantage do.
    """
    top, rankable = config.top_entropy is not None, [np.zeros(0, np.float32)]
    if top:
        rankable += [of[one.trainable] for one, of in zip(completions, entropies, strict=True)]
    shares = ranks.gather((_counts(completions, config), np.concatenate(rankable)))
    metrics: dict[str, Any] = dict.fromkeys(METRICS)
    if config.rollout_correction is not None:
        tokens, masked, truncated, highest = zip(*(counts for counts, _ in shares), strict=True)
        metrics["correction_masked"] = sum(masked) / max(1, sum(tokens))
        metrics["correction_truncated"] = sum(truncated) / max(1, sum(tokens))
        metrics["correction_ratio_max"] = math.exp(min(max(highest), 709.0))  # fp64 ends at exp(709.78)
    if top:
        threshold = entropy_threshold(np.concatenate([part for _, part in shares]), config.top_entropy)
        metrics["top_entropy_threshold"] = threshold
        for completion, of in zip(completions, entropies, strict=True):
            # One that is not finite is kept, so that the step notices it.
            completion.kept = np.ones(len(of), bool) if threshold is None else ~(of < threshold)
    return metrics


def _counts(completions: Sequence[Completion], config: AlgorithmConfig) -> tuple[int, int, int, float]:
    """Of sampled tokens: all, those of weight 0, those whose ratio was cut; and the log of the largest ratio."""
    if config.rollout_correction is None:
        return 0, 0, 0, -math.inf
    low, high = bounds(config)
    tokens = masked = truncated = 0
    highest = -math.inf
    for completion in completions:
        log_ratio, is_sampled = _log_ratio(completion, config.rollout_correction)
        weights = corrected(log_ratio, is_sampled, config)[is_sampled.numpy()]
        log_level = _level(log_ratio, is_sampled, config.rollout_correction)[is_sampled]
        finite = log_level[log_level.isfinite()].double()
        tokens += len(weights)
        masked += int((weights == 0).sum())
        if config.rollout_correction.endswith("truncate"):
            truncated += int(((finite.exp() > high) | (finite.exp() < low)).sum())
        if len(finite):
            highest = max(highest, float(finite.max()))
    return tokens, masked, truncated, highest
