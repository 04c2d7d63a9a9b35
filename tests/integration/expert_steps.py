"""Run on every rank by test_experts.py: a ZeRO-3 step of a mixture of experts; rank 0 saves metrics and gradients."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from rethinker.config import AlgorithmConfig, Config, DataConfig, PolicyConfig, RolloutConfig, TrainConfig
from rethinker.data.prompts import PromptEncoder
from rethinker.policy.engine import PolicyEngine
from rethinker.policy.loading import load_processor
from rethinker.runtime import distributed
from tests.integration.zero3_steps import gradients_at_step, scenario

BUCKETS = {"whole layers": 500_000, "each module": 1}  # stage3_prefetch_bucket_size; see policy.model.gather_by_layer


def note(at_work: list[list[int]], experts: torch.nn.Module, *_: object) -> None:
    at_work.append([parameter.numel() for parameter in experts.parameters()])


def main(model: str, scratch: str, output: str, *budgets: str) -> None:
    ranks = distributed.start(120)
    encoder = PromptEncoder(load_processor(model), DataConfig(min_pixels=1024, max_pixels=8192))
    pictures = Path(scratch) / f"pictures_{ranks.world_size}_{ranks.rank}"
    pictures.mkdir()
    results = {}
    for gathered, bucket in BUCKETS.items():
        for budget in budgets:
            config = Config(
                policy=PolicyConfig(model=model, dtype="float32"),
                rollout=RolloutConfig(max_new_tokens=16),
                algorithm=AlgorithmConfig(clip_low=10.0, clip_high=10.0),  # random behaviour log-probs stay unclipped
                train=TrainConfig(
                    learning_rate=0.0,
                    schedule="constant",
                    warmup_ratio=0,
                    micro_batch_tokens=int(budget),
                    deepspeed={"zero_optimization": {"stage3_prefetch_bucket_size": bucket}},
                ),
            )
            engine = PolicyEngine(config, model, encoder, ranks, total_steps=10)
            gradients = gradients_at_step(engine)
            at_work: list[list[int]] = []
            for layer in engine.policy.family.language_model(engine.policy.hf).layers:
                if experts := getattr(layer.mlp, "experts", None):
                    experts.register_forward_hook(partial(note, at_work), prepend=True)  # before ZeRO-3's own
            for name in ("mixed", "one sample"):  # with two ranks, one of them has no work in the second
                at_work.clear()
                metrics = engine.train_step(scenario(name, pictures, encoder))
                seen = {"metrics": metrics, "gradients": dict(gradients), "weights at work": list(at_work)}
                results[gathered, int(budget), name] = seen
            partitioned = sum(p.ds_tensor.numel() < p.ds_numel for p in engine.policy.parameters())
            results["partitioned"] = partitioned, len(list(engine.policy.parameters()))
    if ranks.is_main:
        torch.save(results, output)
    distributed.stop()
