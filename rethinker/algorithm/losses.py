"""The losses that ship. `algorithm.loss` names one, or a function like them as `path/to/file.py:function`.

A loss takes the log-probs of C tokens and what is known of them, and returns a number per token. `rows` is a `Rows`:
old_logps, advantages, ref_logps, mask, weights [C] and `sequence_mean`. Further parameters are settings: one that is
named like a setting of `algorithm` (clip_high) gets its value. Which tokens count, their weights, the aggregation, the
normalizer, the KL term, the supervised term and the statistics are not the loss's (`objective.py`). The tokens may be
any part of a batch, so a token's loss may depend on others through `rows.sequence_mean` only.

Every public function here whose first parameters are (logps, rows) can be named. Each has loss and gradient 0 where the
advantage is 0, so that such samples need not be computed. `grpo` is written in rethinker_kernels, whose Triton row
kernel, its fast path on a GPU, is tested against it; it adds the KL term itself, as that kernel does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rethinker_kernels.losses import Rows, clamp_log_ratio, grpo

__all__ = ["Rows", "cispo", "gmpo", "grpo", "sapo"]


def cispo(logps: Tensor, rows: Rows, clip_high: float) -> Tensor:
    """CISPO (arXiv 2506.13585; without a lower bound, as in its experiments), per token [C].

        ratio = (logps - old_logps).exp()
        loss = -min(ratio, 1 + clip_high).detach() * A * logps

    The clipped ratio only weighs a token: unlike in GRPO, one that is clipped keeps its gradient.
    """
    ratio = clamp_log_ratio(logps.detach() - rows.old_logps).exp()
    return -ratio.clamp(max=1 + clip_high) * rows.advantages * logps


def sapo(logps: Tensor, rows: Rows, tau_positive: float, tau_negative: float) -> Tensor:
    """SAPO (arXiv 2511.20347), per token [C]; the paper takes `aggregation: sequence`.

        ratio = (logps - old_logps).exp()
        loss = -sigmoid(tau * (ratio - 1)) * 4 / tau * A     # tau_positive where A > 0, else tau_negative

    The gradient's weight is 4 sigmoid (1 - sigmoid): 1 on policy, and it fades on both sides instead of breaking off.
    """
    ratio = clamp_log_ratio(logps - rows.old_logps).exp()
    tau = torch.full_like(ratio, tau_negative).masked_fill(rows.advantages > 0, tau_positive)
    return -torch.sigmoid(tau * (ratio - 1)) * (4 / tau) * rows.advantages


def gmpo(logps: Tensor, rows: Rows, clip_low: float, clip_high: float) -> Tensor:
    """GMPO (arXiv 2507.20673), one number for all tokens of a response [C]; `aggregation: sequence`.

        d = logps - old_logps, s = sign(A)
        d = s * min(s * d, s * d.clamp(-clip_low, clip_high))     # clipped on one side only, as in PPO
        loss = -mean of d over the response .exp() * A

    That is the geometric mean of the ratios of a response. The bounds are those of the log-ratio.
    """
    d = logps - rows.old_logps
    d = torch.where(rows.advantages > 0, d.clamp(max=clip_high), d.clamp(min=-clip_low))
    return -clamp_log_ratio(rows.sequence_mean(d)).exp() * rows.advantages
