"""What a step's metrics count besides the loss's own statistics."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rethinker.config import Config, RolloutConfig
from rethinker.policy.engine import _SUMS, PolicyEngine


@pytest.mark.parametrize("staleness, counted", [(0, 1), (1, 2)])
def test_old_kl_is_of_the_episodes_own_samples(staleness, counted):
    """Responses sampled one episode ahead are one version old when they are trained: old_kl has them, and no older one
    from replay."""
    batch = SimpleNamespace(
        age=torch.tensor([0, 1, 2]),
        cu_seqlens=torch.tensor([0, 1, 2, 3]),
        loss_mask=torch.ones(3, dtype=torch.bool),
        weights=torch.ones(3),
        old_logps=torch.tensor([-1.0, -1.0, -1.0]),
        nll_weights=None,
        tokens=3,
    )
    engine = SimpleNamespace(config=Config(rollout=RolloutConfig(max_staleness=staleness)))
    sums = PolicyEngine._extra_sums(engine, torch.tensor(0.0), torch.tensor([-1.5, -1.5, -1.5]), batch)
    found = dict(zip(_SUMS[-len(sums) :], sums.tolist(), strict=True))
    assert found["fresh_tokens"] == counted
    assert found["fresh_kl_sum"] == pytest.approx(counted * (torch.tensor(0.5).exp().item() - 1.5))
