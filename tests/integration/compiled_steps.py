"""Run on every rank by test_compiled_layers.py: steps with policy.compile and without it; rank 0 saves both.

A run is "BACKEND [OPTION ...]", the options checkpointing, kl and lora.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import torch
from torch._dynamo.utils import counters

import rethinker.policy.model
from rethinker.config import AlgorithmConfig, Config, LoraConfig, PolicyConfig, TrainConfig
from rethinker.policy.engine import PolicyEngine
from rethinker.policy.model import compile_layers
from rethinker.runtime import distributed
from tests.integration.zero3_steps import gradients_at_step
from tests.policy.switches import encoder_for, short_samples

# Response lengths of each step's two queries, an image's and a text; odd steps have the image's only: one row for one.
STEPS = ([2, 3], [7], [5, 9, 1], [4, 4, 4, 4], [20, 30], [1, 2, 3], [17])
COMPILED_BY = 2  # steps until each kind of batch has come once

# Nothing stays gathered that is not at work, and plain layers are gathered a matrix at a time.
_ZERO = ("stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size")
TIGHT = {"zero_optimization": dict.fromkeys(_ZERO, 0)}


def compare(model: str, pictures: Path, ranks, backend: str, *options: str) -> dict:
    torch._dynamo.reset()
    counters.clear()
    rethinker.policy.model.compile_layers = partial(compile_layers, backend=backend)
    encoder = encoder_for(Path(model))
    results = {}
    for compiled in (False, True):
        config = Config(
            policy=PolicyConfig(
                dtype="float32",
                attention="sdpa",  # flash attention, which launches kernels of its own, cuts the graphs
                compile=compiled,
                gradient_checkpointing="checkpointing" in options,
                lora=LoraConfig(rank=4 if "lora" in options else None),
            ),
            # Random behaviour log-probs: leave all unclipped. And no step moves the weights: each can be compared.
            algorithm=AlgorithmConfig(clip_low=10.0, clip_high=10.0, kl_coef=0.1 if "kl" in options else 0.0),
            train=TrainConfig(learning_rate=0.0, weight_decay=0.0, deepspeed=TIGHT),
        )
        engine = PolicyEngine(config, model, encoder, ranks, total_steps=10)
        gradients = gradients_at_step(engine)
        layers = [p for p in engine.policy.hf.model.language_model.layers.parameters() if p.requires_grad]
        steps = []
        for number, lengths in enumerate(STEPS):
            samples = short_samples(encoder, pictures, lengths)
            if number % 2:
                samples = samples[: len(lengths)]
            for i, sample in enumerate(samples):
                sample.owner = i % ranks.world_size
            engine.score(samples)
            live = sum(p.numel() for p in layers)
            start = time.monotonic()
            metrics = engine.train_step(samples)
            seconds = time.monotonic() - start
            graphs = counters["stats"]["unique_graphs"]
            steps.append(
                {"metrics": metrics, "gradients": dict(gradients), "live": live, "graphs": graphs, "seconds": seconds}
            )
        results[compiled] = steps
    return results | {"breaks": dict(counters["graph_break"])}


def main(model: str, scratch: str, output: str, *runs: str) -> None:
    ranks = distributed.start(300)
    pictures = Path(scratch) / f"pictures_{ranks.rank}"
    pictures.mkdir(exist_ok=True)
    results = {run: compare(model, pictures, ranks, *run.split()) for run in runs}
    if ranks.is_main:
        torch.save(results, output)
    distributed.stop()
