"""Run on every rank by test_zero3.py: a ZeRO-3 step of each scenario; rank 0 saves metrics and gradients."""

from __future__ import annotations

import math
import unittest.mock
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_grad

from rethinker.algorithm.corrections import weigh
from rethinker.algorithm.objective import has_gradient
from rethinker.config import AlgorithmConfig, Config, DataConfig, PolicyConfig, RolloutConfig, TrainConfig
from rethinker.data.prompts import PromptEncoder
from rethinker.policy.engine import PolicyEngine
from rethinker.policy.loading import load_processor
from rethinker.runtime import distributed
from rethinker.samples import Rethought
from tests.policy.helpers import queries_of_every_kind, samples_for

SCENARIOS = ("mixed", "text only", "one image among text", "one sample", "equal rewards", "empty responses")


def scenario(name: str, folder: Path, encoder: PromptEncoder):
    one, two, text = queries_of_every_kind(folder)
    if name == "mixed":
        return samples_for([one, two, text], encoder, [5, 9, 1, 12])
    if name == "text only":
        return samples_for([text], encoder, [5, 9, 3])
    if name == "one image among text":  # with two ranks, one of them sees no image
        return samples_for([one, text], encoder, [4])[:1] + samples_for([one, text], encoder, [40, 30])[2:]
    if name == "one sample":  # with two ranks, one of them has no work at all
        return samples_for([one], encoder, [6])
    if name == "empty responses":
        return samples_for([one, text], encoder, [0, 5])
    samples = samples_for([one, text], encoder, [5, 9])
    for sample in samples:
        sample.advantage = 0.0
    return samples


def gradients_at_step(engine: PolicyEngine) -> dict[str, torch.Tensor]:
    """Full gradients of what is trained, as they stand when the next optimizer step begins; the dict fills then."""
    gradients: dict[str, torch.Tensor] = {}
    step = engine.engine.step

    def record_and_step():
        for name, parameter in engine.policy.hf.named_parameters():
            if parameter.requires_grad:
                gradients[name] = safe_get_full_grad(parameter).clone()
        step()

    engine.engine.step = record_and_step
    return gradients


WEIGHED = AlgorithmConfig(rollout_correction="token_mask", correction_low=0.9, correction_high=1.1, top_entropy=0.3)


def scores(
    engine: PolicyEngine, pictures: Path, encoder: PromptEncoder, ranks
) -> tuple[dict, tuple[float, float], tuple[dict, dict]]:
    """Log-probs of each response by (group, index, tokens), from the rank that owns it; k3 from the behaviour's, as
    the engine and as the definition has it; what WEIGHED makes of the scores, and each response's entropies and mask.

    With two ranks each has some; then one batch without a token at all, on one rank.
    """
    samples = scenario("mixed", pictures, encoder) + scenario("empty responses", pictures, encoder)[:1]
    for i, sample in enumerate(samples):
        sample.owner = i % ranks.world_size
    forced = samples[0].completion
    sampled, forced.logprobs[0] = forced.logprobs[0], float("nan")
    assert math.isnan(engine.score(samples[:-1]).mismatch)
    forced.rethought = Rethought(0, 1, "x", 0, 1)  # a trigger: nobody sampled it
    found = engine.score(samples[:-1])
    kl, held = found.mismatch, [s for s in samples[:-1] if s.owner == ranks.rank]
    metrics = weigh([s.completion for s in held], found.entropies, WEIGHED, ranks)
    parts = zip(held, found.entropies, strict=True)
    known = ranks.gather({(s.group, s.index): (of.tolist(), s.completion.kept.tolist()) for s, of in parts})
    weighed = metrics, {place: values for share in known for place, values in share.items()}
    behaviour = {(s.group, s.index): s.completion.logprobs.tolist() for s in samples[:-1]}
    forced.logprobs[0], forced.rethought = sampled, None
    assert engine.score(samples[-1:]).mismatch == 0.0
    mine = [(s.group, s.index, s.completion) for s in samples if s.owner == ranks.rank]
    shares = ranks.gather({(group, index, c.tokens): c.trainer_logprobs.tolist() for group, index, c in mine})
    own = {place: logps for share in shares for place, logps in share.items()}
    scored = {(group, index): logps for (group, index, tokens), logps in own.items() if tokens}
    gaps = [b - p for place, old in behaviour.items() for b, p in zip(old, scored.get(place, []), strict=True)]
    terms = [math.expm1(gap) - gap for gap in gaps if not math.isnan(gap)]
    assert len(terms) == len(gaps) - 1
    return own, (kl, sum(terms) / len(terms)), weighed


def steps(model: str, scratch: str, encoder: PromptEncoder, ranks, budget: int, attention: str) -> dict:
    """Each scenario's step from the same weights, and what comes after the first of them."""
    pictures = Path(scratch) / f"pictures_{ranks.world_size}_{ranks.rank}"
    pictures.mkdir(exist_ok=True)

    def build(rate: float) -> tuple[PolicyEngine, dict[str, torch.Tensor]]:
        config = Config(
            policy=PolicyConfig(model=model, dtype="float32", attention=attention),
            rollout=RolloutConfig(max_new_tokens=16),
            algorithm=AlgorithmConfig(clip_low=10.0, clip_high=10.0),  # random behaviour log-probs: leave all unclipped
            train=TrainConfig(learning_rate=rate, schedule="constant", warmup_ratio=0, micro_batch_tokens=budget),
        )
        engine = PolicyEngine(config, model, encoder, ranks, total_steps=10)
        return engine, gradients_at_step(engine)

    results: dict = {}
    engine, gradients = build(0.0)
    for name in SCENARIOS:
        metrics = engine.train_step(scenario(name, pictures, encoder))
        results[name] = {"metrics": metrics, "gradients": dict(gradients)}
    idle = scenario("mixed", pictures, encoder)
    for sample in idle[3::4]:  # the longest response of each query
        sample.advantage = 0.0
    for name, rule in {"left out": has_gradient, "computed": lambda *_: True}.items():
        with unittest.mock.patch("rethinker.policy.engine.has_gradient", rule):
            results[name] = {"metrics": engine.train_step(idle), "gradients": dict(gradients)}
    engine, gradients = build(1e-3)
    results["partitioned"] = sum(p.ds_tensor.numel() < p.ds_numel for p in engine.policy.parameters())
    results["scored"], results["score_kl"], results["weighed"] = scores(engine, pictures, encoder, ranks)
    metrics = engine.train_step(scenario("mixed", pictures, encoder))
    weights = {n: t.clone() for n, t in engine.weights}
    results["moved"] = {"metrics": metrics, "gradients": dict(gradients), "weights": weights}
    poisoned = scenario("mixed", pictures, encoder)
    poisoned[3].completion.logprobs[0] = float("nan")
    metrics = engine.train_step(poisoned)
    unchanged = all(torch.equal(t, weights[n]) for n, t in engine.weights)
    recovered = engine.train_step(scenario("mixed", pictures, encoder))
    finite = all(bool(t.isfinite().all()) for _, t in engine.weights)
    moved = any(not torch.equal(t, weights[n]) for n, t in engine.weights)
    results["poisoned"] = {"metrics": metrics, "unchanged": unchanged, "recovered": recovered}
    results["poisoned"] |= {"finite": finite, "moved": moved}
    save, save_optimizer = engine.model_snapshot(), engine.optimizer_snapshot()
    folder, optimizer = (Path(scratch) / f"{what}_{ranks.world_size}" for what in ("saved", "optimizer"))
    optimizer.mkdir(exist_ok=True)
    save_optimizer(optimizer)
    if ranks.is_main:
        save(folder)
    ranks.gather(None)  # all have written
    results["expected bytes"] = engine.checkpoint_bytes()
    written = (path.stat().st_size for made in (folder, optimizer) for path in made.glob("*.safetensors"))
    results["written bytes"] = sum(written)
    return results


def main(model: str, scratch: str, output: str, attention: str, *budgets: str) -> None:
    ranks = distributed.start(120)
    encoder = PromptEncoder(load_processor(model), DataConfig(min_pixels=1024, max_pixels=8192))
    results = {int(budget): steps(model, scratch, encoder, ranks, int(budget), attention) for budget in budgets}
    if ranks.is_main:
        torch.save(results, output)
    distributed.stop()
