"""Run under torchrun by test_scaling_presets.py: the same two steps under each of several DeepSpeed overrides.

Usage: torchrun --nproc-per-node N -m tests.integration.scaled_steps MODEL_FOLDER SCRATCH_FOLDER OUTPUT.pt JSON
JSON: {name: train.deepspeed}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from rethinker.config import AlgorithmConfig, Config, PolicyConfig, TrainConfig
from rethinker.policy.engine import PolicyEngine
from rethinker.runtime import distributed
from tests.policy.switches import encoder_for, short_samples


def main(model: str, scratch: str, output: str, overrides: str) -> None:
    ranks = distributed.start(120)
    pictures = Path(scratch) / f"pictures_{ranks.rank}"
    pictures.mkdir(exist_ok=True)
    encoder = encoder_for(Path(model))
    results = {}
    for name, deepspeed in json.loads(overrides).items():
        config = Config(
            policy=PolicyConfig(dtype="float32"),
            algorithm=AlgorithmConfig(clip_low=10.0, clip_high=10.0, kl_coef=0.1),
            train=TrainConfig(learning_rate=1e-4, schedule="constant", warmup_ratio=0, deepspeed=deepspeed),
        )
        engine = PolicyEngine(config, model, encoder, ranks, total_steps=10)
        # The second step's loss is of weights that the first has moved: a stale copy of them would show.
        metrics = [engine.train_step(short_samples(encoder, pictures, lengths)) for lengths in ([5, 9], [7, 3])]
        weights = {key: tensor.clone() for key, tensor in engine.weights}
        parameters = list(engine.policy.parameters())
        results[name] = {
            "metrics": metrics,
            "weights": weights,
            "secondary": sum(p.ds_secondary_tensor.numel() for p in parameters if p.ds_secondary_tensor is not None),
            "parameters": sum(p.ds_numel for p in parameters),
            "offload": engine.optimizer.offload_optimizer,
        }
    if ranks.is_main:
        torch.save(results, output)
    distributed.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
