"""Run on every rank by test_ranks.py: a ZeRO-3 step that gathers each weight alone. Rank 0 saves its gradients,
and the buffers of a policy in bf16."""

from __future__ import annotations

from pathlib import Path

import torch
from deepspeed.utils import get_z3_leaf_modules

from rethinker.config import AlgorithmConfig, Config, DataConfig, PolicyConfig, TrainConfig
from rethinker.data.prompts import PromptEncoder
from rethinker.policy.engine import PolicyEngine
from rethinker.policy.loading import load_processor
from rethinker.runtime import distributed
from tests.integration.compiled_steps import TIGHT
from tests.integration.zero3_steps import gradients_at_step, scenario


def main(model: str, scratch: str, output: str) -> None:
    ranks = distributed.start(300)
    pictures = Path(scratch) / f"pictures_{ranks.world_size}_{ranks.rank}"
    pictures.mkdir()
    encoder = PromptEncoder(load_processor(model), DataConfig(min_pixels=1024, max_pixels=8192))
    config = Config(
        policy=PolicyConfig(model=model, dtype="float32"),
        algorithm=AlgorithmConfig(clip_low=10.0, clip_high=10.0),  # random behaviour log-probs: leave all unclipped
        train=TrainConfig(learning_rate=0.0, weight_decay=0.0, deepspeed=TIGHT),
    )
    engine = PolicyEngine(config, model, encoder, ranks, total_steps=10)
    gradients = gradients_at_step(engine)
    metrics = engine.train_step(scenario("mixed", pictures, encoder))
    whole = {type(module).__name__ for module in get_z3_leaf_modules(engine.policy.hf)}
    buffers = None
    if ranks.world_size > 1:
        config.policy.dtype = "bfloat16"
        policy = PolicyEngine(config, model, encoder, ranks, total_steps=10).policy
        buffers = {name: buffer.cpu() for name, buffer in policy.hf.named_buffers()}
    if ranks.is_main:
        torch.save({"metrics": metrics, "gradients": gradients, "whole": whole, "buffers": buffers}, output)
    distributed.stop()
