"""Every loss and every rule of advantages trains the embedded default: real vLLM, real ZeRO-3, real rewards."""

from __future__ import annotations

import json
import math
from statistics import mean

import pytest

from tests import forked

TWO_FUNCTIONS = "[{function: boxed}, {function: format, weight: 0.2}]"
METHODS = {
    "grpo": ("sums_cpu", {"name": "grpo"}),
    "dapo": ("sums_cpu+dapo", {}),
    "dr_grpo": ("sums_cpu+dr_grpo", {}),
    "gspo": ("sums_cpu+gspo", {"name": "grpo"}),
    "cispo": ("sums_cpu+cispo", {"name": "grpo"}),
    "sapo": ("sums_cpu+sapo", {"name": "grpo"}),
    "gmpo": ("sums_cpu+gmpo", {"name": "grpo"}),
    "rloo": ("sums_cpu+rloo", {}),
    "reinforce_pp": ("sums_cpu+reinforce_pp", {}),
    "reinforce_pp_baseline": ("sums_cpu+reinforce_pp", {"advantage_baseline": "group"}),
    "gdpo": ("sums_cpu", {"name": "grpo", "advantages_per_reward": True, "reward.functions": TWO_FUNCTIONS}),
    "sapo with a KL term and replay": ("sums_cpu+sapo", {"name": "ssr", "kl_coef": 0.01}),
    "entropy bonus": ("sums_cpu", {"name": "grpo", "entropy_coef": 0.001}),
    "tokens of high entropy": ("sums_cpu", {"name": "grpo", "top_entropy": 0.2}),
    "a tool": ("crop_cpu", {}),
    "a reference that moves": ("sums_cpu", {"name": "grpo", "kl_coef": 0.01, "reference_every": 1}),
}
"""The recipe, and settings of `algorithm` or by their whole names."""


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("method", METHODS)
def test_it_learns(method, tmp_path):
    """20 steps: every one is applied and moves the policy, and the last five have more reward than the first five."""
    recipe, settings = METHODS[method]
    options = [
        word
        for name, value in settings.items()
        for word in (f"--{name if '.' in name else f'algorithm.{name}'}", str(value))
    ]
    options += ["--run.dir", str(tmp_path), "--run.name", "run", "--train.max_steps", "20", "--data.validation", "null"]
    forked.run(forked.training([recipe, *options]), tmp_path / "log", ranks=2)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rewards = [row["reward_mean"] for row in rows]
    print(f"{method}: mean reward {mean(rewards[:5]):.3f} of steps 1-5, {mean(rewards[-5:]):.3f} of steps 16-20")
    assert len(rows) == 20 and all(row["skipped"] == 0 and math.isfinite(row["loss"]) for row in rows)
    assert all(row["grad_norm"] > 0 for row in rows)
    assert mean(rewards[-5:]) > mean(rewards[:5])
