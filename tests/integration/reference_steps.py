"""Run on every rank by test_moving_reference.py: ZeRO-3 steps around a move of the reference policy and after a resume,
and steps with an entropy bonus and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rethinker.config import AlgorithmConfig, Config, LoraConfig, PolicyConfig, RolloutConfig, TrainConfig
from rethinker.data.prompts import PromptEncoder
from rethinker.policy.engine import PolicyEngine
from rethinker.runtime import distributed
from tests.policy.helpers import encoder_and_samples

KINDS = {
    "full": {"policy": {"freeze_vision": True}},
    "lora": {"policy": {"lora": LoraConfig(rank=4)}},
    # As on a GPU: ZeRO-3 keeps small weights whole between steps.
    "kept whole": {"train": {"deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 100_000}}}},
}
"""What a policy trains, and how ZeRO-3 holds it."""

SAVED = ("full", "lora")

RATES = {"full": 1e-4, "lora": 1e-3, "kept whole": 1e-4}


def settings(model: str, kind: str, rate: float, **algorithm: Any) -> Config:
    given = {"policy": {}, "train": {}} | KINDS[kind]
    return Config(
        policy=PolicyConfig(model=model, dtype="float32", **given["policy"]),
        rollout=RolloutConfig(max_new_tokens=16),
        algorithm=AlgorithmConfig(clip_low=10.0, clip_high=10.0, **algorithm),  # random behaviour log-probs
        train=TrainConfig(learning_rate=rate, schedule="constant", warmup_ratio=0, **given["train"]),
    )


def kept(engine: PolicyEngine) -> dict[str, torch.Tensor]:
    """The reference's own copy, as files of this rank have it."""
    return {name: kept.ds_tensor.clone() for name, (_, kept) in engine.moving._pairs.items()}


def moved_and_resumed(model: str, kind: str, folder: Path, encoder: PromptEncoder, samples: list, ranks) -> dict:
    """Steps before and after a move; on two ranks also from a checkpoint between the move and the next step."""
    config = settings(model, kind, RATES[kind], kl_coef=0.1, reference_every=1)
    engine = PolicyEngine(config, model, encoder, ranks, total_steps=20)
    found: dict[str, Any] = {"first": kept(engine), "own": engine.reference is None}
    found["before"] = [engine.train_step(samples)["kl"] for _ in range(3)]
    engine.moving.move()
    found["moved"] = kept(engine)
    saves = ranks.world_size == 2 and kind in SAVED
    if saves:
        (folder / "trainer").mkdir(parents=True, exist_ok=True)
        for write in (engine.optimizer_snapshot(), engine.moving.snapshot()):
            write(folder / "trainer")
        write, found["counters"] = engine.model_snapshot(), engine.state_dict()
        if ranks.is_main:
            write(folder)
    found["after"] = [engine.train_step(samples) for _ in range(3)]
    found["still"], found["expected bytes"] = kept(engine), engine.checkpoint_bytes()
    ranks.gather(None)  # all have written
    return found | (resumed(config, model, folder, encoder, samples, found["counters"], ranks) if saves else {})


def resumed(config: Config, model: str, folder: Path, encoder, samples: list, counters: dict, ranks) -> dict:
    """The steps after a checkpoint, of whatever number of ranks."""
    again = PolicyEngine(config, folder, encoder, ranks, total_steps=20, initial_dir=model)
    again.load_state_dict(counters)
    again.load_optimizer(folder / "trainer", counters["adam_steps"])
    again.moving.load(folder / "trainer")
    return {"loaded": kept(again), "resumed": [again.train_step(samples) for _ in range(3)]}


def entropies(model: str, encoder: PromptEncoder, samples: list, ranks) -> dict[float, list[float]]:
    """Of each step, by the bonus's weight."""
    found = {}
    for weight in (0.0, 0.5):
        config = settings(model, "full", rate=1e-3, entropy_coef=weight)
        engine = PolicyEngine(config, model, encoder, ranks, total_steps=20)
        found[weight] = [engine.train_step(samples)["entropy"] for _ in range(5)]
    return found


def main(model: str, scratch: str, output: str) -> None:
    ranks = distributed.start(120)
    encoder, samples = encoder_and_samples(model, Path(scratch), ranks)
    results: dict[str, Any] = {}
    for kind in KINDS:
        results[kind] = moved_and_resumed(model, kind, Path(scratch) / kind, encoder, samples, ranks)
    if ranks.world_size == 1:
        results["entropies"] = entropies(model, encoder, samples, ranks)
        of_two = torch.load(Path(scratch) / "2.pt", weights_only=False)
        for kind in SAVED:
            config = settings(model, kind, RATES[kind], kl_coef=0.1, reference_every=1)
            counters = of_two[kind]["counters"]
            results[kind] |= resumed(config, model, Path(scratch) / kind, encoder, samples, counters, ranks)
    if ranks.is_main:
        torch.save(results, output)
    distributed.stop()
