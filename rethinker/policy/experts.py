"""Mixtures of experts in training: which experts a token takes, with what weights, and how evenly they are taken.

Legend: T tokens of the packed row, X tokens as the layers see them (B * L), E experts, k of them for each token, D
hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Router(nn.Module):
    """A family's router: softmax over the experts, the k largest, their weights divided by their sum unless the model's
    norm_topk_prob is false. It is only ever the class of a module that was made as another, and has that one's `weight`
    [E, D] and `top_k`.

    As in vLLM, logits have the model's type, and the softmax and the weights are fp32; transformers rounds the weights.
    """

    chosen: Tensor | None = None
    """[X, k], any integers: the experts to take (rollout.router_replay); None: those of the largest probability."""
    real: Tensor | None = None
    """[T] int64: which of the X tokens are no padding; None: all."""
    load: Tensor
    """[E] fp32: how many of these tokens each expert got in the last forward."""

    def score(self, hidden: Tensor) -> Tensor:
        """Logits [X, E] for hidden states [X, D]."""
        return nn.functional.linear(hidden, self.weight)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [X, E], weights [X, k] fp32 and experts [X, k] int64 for hidden states [..., D]."""
        logits = self.score(hidden.flatten(0, -2))
        probabilities = logits.softmax(-1, dtype=torch.float32)
        if self.chosen is None:
            weights, experts = probabilities.topk(self.top_k, dim=-1)
        else:
            experts = self.chosen.long()
            weights = probabilities.gather(1, experts)
        counted = (experts if self.real is None else experts.index_select(0, self.real)).flatten()
        # Not bincount: it would ask the device for the largest number.
        self.load = probabilities.new_zeros(probabilities.shape[-1]).scatter_add_(
            0, counted, weights.new_ones(len(counted))
        )
        if getattr(self, "norm_topk_prob", True):
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights, experts


class ScaledRouter(Router):
    """Gemma 4's router, which scales the hidden states that it reads and the weights that it gives."""

    def score(self, hidden: Tensor) -> Tensor:
        """See Router."""
        return self.proj(self.norm(hidden) * self.scale * self.scalar_root_size)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See Router."""
        logits, weights, experts = super().forward(hidden)
        return logits, weights * self.per_expert_scale[experts], experts


def load_statistics(load: Tensor) -> dict[str, float | None]:
    """What a step logs of its experts' load: None of each without experts, or in a step that computed nothing.

    Args:
        load: [layers, E], tokens that each expert got, on the host.
    """
    if not load.any():
        return dict.fromkeys(("expert_load_max", "expert_load_mean", "experts_unused"))
    share = load / load.mean(dim=1, keepdim=True).clamp(min=1e-9)  # 1: an even share
    return {
        "expert_load_max": share.amax().item(),
        "expert_load_mean": share.amax(dim=1).mean().item(),
        "experts_unused": (load == 0).double().mean().item(),
    }
