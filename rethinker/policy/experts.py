"""Mixtures of experts in training: which experts a token takes, with what weights, and how evenly they are taken.

Legend: T tokens of the packed row, X tokens as the layers see them (B * L), E experts, k of them for each token, D
hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rethinker.config import ConfigError


class Router(nn.Module):
    """A family's router: softmax over the experts, the k largest, their weights divided by their sum unless the model's
    norm_topk_prob is false. It is only ever the class of a module that was made as another, and has that one's weights
    and `top_k`.

    As in vLLM, logits have the model's type (but for GroupedRouter), and scores and weights are fp32; transformers
    rounds the weights.
    """

    chosen: Tensor | None = None
    """[X, k], any integers: the experts to take (rollout.router_replay); None: the router's own choice."""
    real: Tensor | None = None
    """[T] int64: which of the X tokens are no padding; None: all."""
    load: Tensor
    """[E] fp32: how many of these tokens each expert got in the last forward."""

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [X, E], weights [X, k] fp32 and experts [X, k] int64 for hidden states [..., D]."""
        logits, scores = self.score(hidden.flatten(0, -2))
        experts = self.choose(scores.detach()) if self.chosen is None else self.chosen.long()
        weights = scores.gather(1, experts)
        counted = (experts if self.real is None else experts.index_select(0, self.real)).flatten()
        # Not bincount: it would ask the device for the largest number.
        self.load = scores.new_zeros(scores.shape[-1]).scatter_add_(0, counted, weights.new_ones(len(counted)))
        if getattr(self, "norm_topk_prob", True):
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights, experts

    def score(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and scores [X, E], of which weights are made, for hidden states [X, D]."""
        logits = nn.functional.linear(hidden, self.weight)
        return logits, logits.softmax(-1, dtype=torch.float32)

    def choose(self, scores: Tensor) -> Tensor:
        """The experts [X, k] int64 that tokens of these scores take."""
        return scores.topk(self.top_k, dim=-1).indices


class GroupedRouter(Router):
    """Sigmoids in place of the softmax, and experts in groups. Those are taken whose scores are the largest once
    `e_score_correction_bias` [E] is added, of the `topk_group` groups whose two largest have the largest sum; weights
    are made of the scores themselves, and multiplied by `routed_scaling_factor`.

    Logits are fp32, too. The corrections are no parameter: they balanced the experts' load before, and are kept.
    """

    e_score_correction_bias: Tensor
    """[E] fp32."""

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See Router."""
        logits, weights, experts = super().forward(hidden)
        return logits, weights * self.routed_scaling_factor, experts

    def score(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """See Router."""
        logits = nn.functional.linear(hidden.float(), self.weight.float())
        return logits, logits.sigmoid()

    def choose(self, scores: Tensor) -> Tensor:
        """See Router."""
        grouped = (scores + self.e_score_correction_bias).unflatten(1, (self.num_group, -1))
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(self.topk_group, dim=-1).indices  # [X, topk_group]
        closed = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, False)  # [X, num_group]
        return grouped.masked_fill(closed[..., None], -torch.inf).flatten(1).topk(self.top_k, dim=-1).indices


class ScaledRouter(Router):
    """Gemma 4's router, which scales the hidden states that it reads and the weights that it gives."""

    def score(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """See Router."""
        logits = self.proj(self.norm(hidden) * self.scale * self.scalar_root_size)
        return logits, logits.softmax(-1, dtype=torch.float32)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See Router."""
        logits, weights, experts = super().forward(hidden)
        return logits, weights * self.per_expert_scale[experts], experts


def take_over(routers: dict[int, nn.Module]) -> dict[int, Router]:
    """Make a model's own routers, by the number of their layer, one of these, in place.

    Raises:
        ConfigError: a router cannot choose as it is to.
    """
    for router in routers.values():
        if not 0 < router.top_k <= router.num_experts:
            raise ConfigError(
                f"policy.model: its routers are to choose {router.top_k} of {router.num_experts} experts; correct its "
                "config.json"
            )
        grouped, scaled = (hasattr(router, name) for name in ("e_score_correction_bias", "per_expert_scale"))
        if grouped:
            groups = router.num_group
            size = router.num_experts // groups if groups > 0 and router.num_experts % groups == 0 else 0
            if size < 2 or not router.top_k <= size * router.topk_group <= router.num_experts:
                raise ConfigError(
                    f"policy.model: its routers are to choose {router.top_k} of {router.num_experts} experts, in "
                    f"{router.topk_group} of {groups} groups; correct n_group and topk_group in its config.json"
                )
        router.__class__ = GroupedRouter if grouped else ScaledRouter if scaled else Router
    return routers


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
