"""Fused ops for reinforcement learning of language models, usable without the trainer.

    selective_log_softmax         log-probabilities (and entropies) of chosen tokens, from logits
    linear_selective_log_softmax  the same from hidden states and the head's weight: [R, V] is never held whole
    policy_loss                   any loss that is a function of log-probs, summed over a batch, and its statistics
    linear_policy_loss            the same from hidden states and the head's weight, gradients made in the forward pass
    grpo_loss, linear_grpo_loss   these two of GRPO's clipped surrogate
    group_advantages              group-normalised rewards
    SumTree                       exact sampling in proportion to priorities

Each docstring states the op's PyTorch equivalent, its shapes and its errors.
"""

from rethinker_kernels.advantages import group_advantages
from rethinker_kernels.linear import linear_selective_log_softmax
from rethinker_kernels.linear_loss import linear_grpo_loss, linear_policy_loss
from rethinker_kernels.log_softmax import selective_log_softmax
from rethinker_kernels.losses import GRPO_STATS, LINEAR_GRPO_STATS, grpo_loss, policy_loss
from rethinker_kernels.sum_tree import SumTree

__all__ = [
    "GRPO_STATS",
    "LINEAR_GRPO_STATS",
    "SumTree",
    "group_advantages",
    "grpo_loss",
    "linear_grpo_loss",
    "linear_policy_loss",
    "linear_selective_log_softmax",
    "policy_loss",
    "selective_log_softmax",
]
