"""The training objective on a packed batch: GRPO's clipped surrogate with the settings of `algorithm`.

Shapes: R response tokens and S responses of a packed row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from rethinker.config import AlgorithmConfig
from rethinker.samples import Completion, PackedBatch, Sample


def surrogate_inputs(
    batch: PackedBatch, config: AlgorithmConfig, normalizer: float, ref_logps: Tensor | None = None
) -> dict[str, Any]:
    """What `rethinker_kernels.linear_grpo_loss` needs of a micro-batch beside hidden states, head and tokens.

    The losses of a step's micro-batches, over all ranks, add up to the step's loss. A token that counts and whose
    log-prob is not finite makes the loss NaN: the step is then to be skipped.

    Args:
        batch: its old_logps, advantages [S], weights ([R], or [S]), loss_mask and cu_seqlens.
        config: the `algorithm` settings.
        normalizer: `loss_normalizer` of the whole step.
        ref_logps: [R], the reference policy's log-probs; needed when `algorithm.kl_coef` is not 0.
    """
    return {
        "old_logps": batch.old_logps,
        "advantages": batch.advantages,
        "cu_seqlens": batch.cu_seqlens,
        "ref_logps": ref_logps,
        "clip_low": config.clip_low,
        "clip_high": config.clip_high,
        "dual_clip": config.dual_clip,
        "kl_coef": config.kl_coef,
        "kl_estimator": config.kl_estimator,
        "importance": config.importance,
        "aggregation": config.aggregation,
        "weights": batch.weights,
        "mask": batch.loss_mask,
        "nll_weights": batch.nll_weights,
        "normalizer": normalizer,
    }


def loss_normalizer(samples: list[Sample], config: AlgorithmConfig, max_new_tokens: int) -> float:
    """What a step's summed loss is divided by, from all samples of the step over all ranks.

    Samples of weight 0 count nowhere. At least 1, so that a step without a trainable token has loss 0.

    Args:
        samples: the step's samples, over all ranks and micro-batches.
        config: `aggregation` chooses: `token` the trainable response tokens, `sequence` the samples, `constant` the
            samples times `max_new_tokens`.
        max_new_tokens: `rollout.max_new_tokens`.
    """
    counted = [sample for sample in samples if sample.weight != 0]
    if config.aggregation == "token":
        return float(max(1, sum(sample.completion.trainable_tokens for sample in counted)))
    return float(max(1, len(counted) * (max_new_tokens if config.aggregation == "constant" else 1)))


def supervised_weight(samples: list[Sample], weight: float) -> float:
    """Factor of every token's -log p in the supervised term: `weight` over the tokens of all rethought responses.

    Args:
        samples: the step's samples, over all ranks and micro-batches.
        weight: `rethink.supervised_weight`.
    """
    tokens = sum(sample.completion.tokens for sample in samples if sample.completion.supervised)
    return weight / tokens if tokens else 0.0


def trainable_mask(completion: Completion) -> np.ndarray:
    """bool [L]: whether a token carries a policy gradient. Masked tokens (forced ones were not sampled) do not.

    A non-finite log-prob elsewhere is a fault and stays in, to be noticed.
    """
    mask = np.ones(completion.tokens, bool)
    if completion.rethought is not None:
        mask[completion.rethought.masked_start : completion.rethought.masked_end] = False
    return mask
