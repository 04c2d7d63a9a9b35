"""Run by test_router_replay.py: what vLLM returns of its experts, and how far the policy's log-probs are from its own.

Usage: replayed_experts.py <model folder> <scratch folder>
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from tests.rollout.interpreted import interpret_triton

interpret_triton()

import torch  # noqa: E402

from rethinker.policy.packing import pack  # noqa: E402
from rethinker.samples import Bundle, Completion, Prompt, Sample  # noqa: E402
from tests.families.test_rollout import Setting, Weights  # noqa: E402

PLAIN = {"n": 3, "max_new_tokens": 12, "temperature": 1.0}


def blur(setting: Setting, policy_version: int) -> None:
    """Make the experts of a router so alike that rounding chooses among them, and tell the engine."""
    generator = torch.Generator().manual_seed(0)
    for router in setting.policy.routers.values():
        weight, alike = getattr(router, "proj", router).weight.data, [0, 0, 0, 1, 1, 1, 1, 1]
        weight[:] = weight[alike] + 1e-8 * torch.randn(weight.shape, generator=generator)
        if hasattr(router, "e_score_correction_bias"):
            router.e_score_correction_bias[:] = router.e_score_correction_bias[alike]
    setting.engine.sync(Weights(setting.policy), policy_version)


@torch.no_grad()
def gaps(setting: Setting, seed: int) -> dict[str, float]:
    """Largest difference of log-probs: with the engine's experts, with the policy's own, and with planted ones."""
    sampled = setting.engine.generate(setting.prompts, seed=seed, **PLAIN)
    bundles = []
    for query, prompt, group in zip(setting.queries, setting.prompts, sampled, strict=True):
        shared = {"advantage": 1.0, "policy_version": 0, "prompt_tokens": len(prompt.token_ids)}
        bundles.append(Bundle(query, tuple(Sample(query, completion, **shared) for completion in group)))
    batch = pack(bundles, setting.encoder.encode, setting.encoder.pixels, setting.policy.positions)
    others = {"own": None, "replayed": batch.experts, "planted": (batch.experts + 1) % 8}
    found = {}
    for name, experts in others.items():
        logps, _ = setting.policy(replace(batch, experts=experts))
        found[name] = (batch.old_logps.double() - logps.double()).abs().max().item()
    return found


def shapes(prompts: list[Prompt], groups: list[list[Completion]]) -> list[tuple]:
    """Of each completion: rows less tokens of prompt and response, the other extents, type."""
    known = [(prompt, c) for prompt, group in zip(prompts, groups, strict=True) for c in group]
    return [
        (len(c.experts) - len(p.token_ids) - c.tokens, *c.experts.shape[1:], str(c.experts.dtype)) for p, c in known
    ]


def main(folder: str, scratch: str) -> None:
    setting = Setting(Path(folder), Path(scratch), "vllm", router_replay=True)
    seen: dict = {"shapes": shapes(setting.prompts, setting.engine.generate(setting.prompts, seed=0, **PLAIN))}
    seen["as loaded"] = gaps(setting, seed=0)
    setting.perturb(seed=1)
    setting.engine.sync(Weights(setting.policy), 1)
    seen["after a sync"] = gaps(setting, seed=1)
    blur(setting, 2)
    seen["blurred"] = gaps(setting, seed=2)
    Path(scratch, "seen.json").write_text(json.dumps(seen))
    setting.engine.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
