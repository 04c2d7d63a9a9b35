"""Run on every rank by test_lora.py: ZeRO-3 steps with adapters, stopped, resumed, and against a reference policy."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from rethinker.config import (
    AlgorithmConfig,
    Config,
    ConfigError,
    DataConfig,
    LoraConfig,
    PolicyConfig,
    RolloutConfig,
    TrainConfig,
)
from rethinker.data.prompts import PromptEncoder
from rethinker.policy import lora
from rethinker.policy.engine import PolicyEngine
from rethinker.policy.lora import FullWeights
from rethinker.rollout.hf_engine import HFEngine
from rethinker.runtime import distributed
from tests.policy.helpers import encoder_and_samples
from tests.rollout.helpers import hf_logprobs

STEPS = 2  # before the stop, and after it


def settings(model: str, **algorithm) -> Config:
    return Config(
        policy=PolicyConfig(model=model, dtype="float32", gradient_checkpointing=True, lora=LoraConfig(rank=4)),
        data=DataConfig(min_pixels=1024, max_pixels=8192),
        rollout=RolloutConfig(max_new_tokens=16),
        # Random behaviour log-probs: leave all unclipped.
        algorithm=AlgorithmConfig(clip_low=10.0, clip_high=10.0, **algorithm),
        train=TrainConfig(learning_rate=1e-2, schedule="constant", warmup_ratio=0, micro_batch_tokens=50),
    )


def full(named: list, adapters: dict | None = None) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in FullWeights(named, adapters or {})}


def state_of(engine: PolicyEngine) -> dict[str, torch.Tensor]:
    """All that training moves, or must not: base and merged weights under `base.*` and `merged.*`, A and B."""
    base = full(lora.base_parameters(engine.policy.hf))
    merged = {name: tensor.clone() for name, tensor in engine.weights}
    both = {f"base.{n}": t for n, t in base.items()} | {f"merged.{n}": t for n, t in merged.items()}
    return both | full(lora.adapter_parameters(engine.adapters))


def stopped_and_resumed(config: Config, scratch: Path, encoder: PromptEncoder, samples: list, ranks) -> dict:
    """The metrics and states of a run, and of one that goes on from its checkpoint in the middle."""
    model, folder = config.policy.model, scratch / f"checkpoint_{ranks.world_size}"
    engine = PolicyEngine(config, model, encoder, ranks, total_steps=10)
    results = {"start": state_of(engine), "partitioned": all(p.ds_tensor.numel() < p.ds_numel for p in parts(engine))}
    results["first"] = [engine.train_step(samples) for _ in range(STEPS)]
    write, write_optimizer, counters = engine.model_snapshot(), engine.optimizer_snapshot(), engine.state_dict()
    (folder / "trainer").mkdir(parents=True, exist_ok=True)
    write_optimizer(folder / "trainer")
    if ranks.is_main:
        write(folder)
    results["saved"] = state_of(engine)
    results["mismatch"] = mismatch(engine, folder, config, encoder, samples)
    results["rest"] = [engine.train_step(samples) for _ in range(STEPS)], state_of(engine)
    ranks.gather(None)  # rank 0 has written
    again = PolicyEngine(config, folder, encoder, ranks, total_steps=10, initial_dir=model)
    again.load_state_dict(counters)
    again.load_optimizer(folder / "trainer", counters["adam_steps"])
    results["resumed"] = [again.train_step(samples) for _ in range(STEPS)], state_of(again)
    return results


def parts(engine: PolicyEngine) -> list[torch.nn.Parameter]:
    return list(engine.policy.parameters())


def mismatch(engine: PolicyEngine, folder: Path, config: Config, encoder: PromptEncoder, samples: list) -> float:
    """Largest difference, in nats, between the policy's log-probs and a synced hf engine's."""
    rollout = HFEngine(config, config.policy.model, distributed.ALONE)
    rollout.sync(engine.weights, 1)
    for sample in samples:
        sample.owner = engine.ranks.rank
    engine.score(samples)
    prompts = [encoder.encode(sample.query) for sample in samples]
    scores = [hf_logprobs(rollout, prompt, sample.completion) for prompt, sample in zip(prompts, samples, strict=True)]
    ours = [sample.completion.trainer_logprobs for sample in samples]
    return max((torch.tensor(a) - b).abs().max().item() for a, b in zip(ours, scores, strict=True))


def refusals(config: Config, scratch: Path, encoder: PromptEncoder, counters: dict, ranks) -> list[str]:
    """What a resumed run says when its base has been moved, when it has been trained since, and when it is gone."""
    folder, base = scratch / f"checkpoint_{ranks.world_size}", scratch / "base"
    said = []
    shutil.copytree(config.policy.model, base)
    for change in (
        lambda: None,
        lambda: shutil.copy2(folder / "model.safetensors", base),  # merged weights in the base's place
        lambda: shutil.rmtree(base),
    ):
        change()
        try:
            PolicyEngine(config, folder, encoder, ranks, 10, initial_dir=base).load_state_dict(counters)
            said.append("")
        except ConfigError as error:
            said.append(str(error))
    return said


def main(model: str, scratch: str, output: str) -> None:
    ranks = distributed.start(120)
    encoder, samples = encoder_and_samples(model, Path(scratch), ranks)
    config = settings(model)
    results = stopped_and_resumed(config, Path(scratch), encoder, samples, ranks)
    if ranks.world_size == 1:
        checkpoint, copy = Path(scratch) / "checkpoint_1", shutil.copytree(model, Path(scratch) / "copy")
        new = settings(str(checkpoint))
        results["new run"] = state_of(PolicyEngine(new, checkpoint, encoder, ranks, 10, initial_dir=checkpoint))
        for name, reference in (("own reference", None), ("second model", copy)):
            engine = PolicyEngine(settings(model, kl_coef=0.1), model, encoder, ranks, 10, initial_dir=reference)
            results[name] = [engine.train_step(samples) for _ in range(2)], state_of(engine), engine.reference is None
        results["refusals"] = refusals(config, Path(scratch), encoder, engine.state_dict(), ranks)
    if ranks.is_main:
        torch.save(results, output)
    distributed.stop()
