"""Fused ops for reinforcement learning of language models, usable without the trainer.

    selective_log_softmax         log-probabilities (and entropies) of chosen tokens, from logits
    linear_selective_log_softmax  the same from hidden states and the head's weight: [R, V] is never held whole
    grpo_loss                     the clipped surrogate, its KL term and its statistics
    linear_grpo_loss              both of the above in one call
    group_advantages              group-normalised rewards
    SumTree                       exact sampling in proportion to priorities

Each docstring states the op's PyTorch equivalent, its shapes and its errors.
"""

from rethinker_kernels.advantages import group_advantages
from rethinker_kernels.linear import linear_selective_log_softmax
from rethinker_kernels.linear_grpo import linear_grpo_loss
from rethinker_kernels.log_softmax import selective_log_softmax
from rethinker_kernels.reference import GRPO_STATS, LINEAR_GRPO_STATS
from rethinker_kernels.sum_tree import SumTree
from rethinker_kernels.surrogate import grpo_loss

__all__ = [
    "GRPO_STATS",
    "LINEAR_GRPO_STATS",
    "SumTree",
    "group_advantages",
    "grpo_loss",
    "linear_grpo_loss",
    "linear_selective_log_softmax",
    "selective_log_softmax",
]
