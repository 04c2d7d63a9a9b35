"""Run on every rank by test_loss_head.py: the same optimizer step with the fused loss head and with its two lines."""

from __future__ import annotations

from pathlib import Path

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from rethinker.algorithm.objective import load_loss
from rethinker.config import AlgorithmConfig, Config, ConfigError, DataConfig, PolicyConfig, RolloutConfig, TrainConfig
from rethinker.data.prompts import PromptEncoder
from rethinker.policy.engine import PolicyEngine
from rethinker.policy.loading import load_processor
from rethinker.policy.model import LossHead
from rethinker.policy.packing import plan_micro_batches
from rethinker.runtime import distributed
from rethinker_kernels import linear_selective_log_softmax, policy_loss
from tests.integration.zero3_steps import gradients_at_step, scenario

LOSSES = """
calls = []

def cispo(logps, rows, clip_high):
    ratio = (logps.detach() - rows.old_logps).exp()
    return -ratio.clamp(max=1 + clip_high) * rows.advantages * logps

def breaks(logps, rows):
    return cispo(logps, rows, 0.2) * (1.0 if tried(breaks) else float("nan"))

def shrinks(logps, rows):
    return cispo(logps, rows, 0.2)[slice(None) if tried(shrinks) else slice(1)]

def raises(logps, rows):
    return cispo(logps, rows, 0.2) / (1 if tried(raises) else 0 // 0)

def tried(loss):
    calls.append(loss)
    return calls.count(loss) < 6
"""
"""Losses of the user's own; all but the first are in order in the five calls of their trial, and not in training."""

BUDGET = 100  # tokens: several micro-batches a step


def unfused(head, hidden, index=None, temperature=1.0, objective=None):
    """`LossHead.forward` as a composition that autograd differentiates."""
    logps, entropy = linear_selective_log_softmax(
        hidden, head.weight, index, bias=head.bias, temperature=temperature, return_entropy=True
    )
    objective = {name: value for name, value in objective.items() if name != "nll_weights"}
    loss, stats = policy_loss(logps, **objective)
    counted = objective["mask"] & (objective["weights"] != 0)
    return loss, logps.detach(), torch.cat([stats, entropy.detach()[counted].sum().double()[None]])


def count_gathers(weight: torch.nn.Parameter) -> list[int]:
    """A counter in a list: how often ZeRO-3 gathered the weight from the ranks."""
    gather = "_PartitionedParameterCoordinator__all_gather_params_"
    original, count = getattr(PartitionedParameterCoordinator, gather), [0]

    def counted(coordinator, parameters, *rest, **named):
        missing = [p for p in parameters if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]
        count[0] += sum(p is weight for p in missing)
        return original(coordinator, parameters, *rest, **named)

    setattr(PartitionedParameterCoordinator, gather, counted)
    return count


def steps(model: str, pictures: Path, ranks) -> dict:
    """Metrics and gradients from the same weights, by (importance, way), and gathers of the head in the last step."""
    encoder = PromptEncoder(load_processor(model), DataConfig(min_pixels=1024, max_pixels=8192))
    samples = scenario("mixed", pictures, encoder)
    results = {"micro_batches": len(plan_micro_batches(samples, budget=BUDGET, world_size=ranks.world_size)[0])}
    config = Config(
        policy=PolicyConfig(model=model, dtype="float32"),
        rollout=RolloutConfig(max_new_tokens=16, temperature=0.9),
        algorithm=AlgorithmConfig(dual_clip=3.0),
        train=TrainConfig(learning_rate=0.0, micro_batch_tokens=BUDGET),
    )
    engine = PolicyEngine(config, model, encoder, ranks, total_steps=10)
    gradients, head = gradients_at_step(engine), engine.policy.hf.lm_head
    for importance in ("token", "sequence"):
        config.algorithm.importance = importance
        engine.loss = load_loss(config.algorithm)
        for forward in (unfused, LossHead.forward):
            head.forward = forward.__get__(head)
            metrics = engine.train_step(samples)
            results[importance, forward.__name__] = {"metrics": metrics, "gradients": dict(gradients)}
    # The first steps let DeepSpeed learn the order of the modules; from then on it keeps to it.
    count = count_gathers(head.weight)
    engine.train_step(samples)
    results["gathers"] = count[0]
    own = pictures / "losses.py"
    own.write_text(LOSSES)
    for name in ("cispo", "breaks", "shrinks", "raises"):
        config.algorithm = AlgorithmConfig(loss=f"{own}:{name}")
        engine.loss = load_loss(config.algorithm)
        try:
            results[name] = engine.train_step(samples)
        except ConfigError as error:
            results[name] = str(error)
    return results


def main(scratch: str, output: str, *models: str) -> None:
    ranks = distributed.start(120)
    pictures = Path(scratch) / f"pictures_{ranks.rank}"
    pictures.mkdir(exist_ok=True)
    results = [steps(model, pictures, ranks) for model in models]
    if ranks.is_main:
        torch.save(results, output)
    distributed.stop()
