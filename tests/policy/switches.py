"""What tests of a policy's switches compare: the same batch through two policies, log-probs and gradients."""

from __future__ import annotations

from pathlib import Path

import torch

from rethinker.config import DataConfig, PolicyConfig
from rethinker.data.prompts import PromptEncoder
from rethinker.policy.loading import load_model, load_processor
from rethinker.policy.model import Policy
from rethinker.policy.packing import pack, plan_micro_batches
from rethinker.samples import PackedBatch, Query, Sample
from tests.policy.helpers import picture, samples_for


def make(folder: Path, **settings) -> Policy:
    """A policy whose biases and scales are not those of an initialisation; equal ones for equal folders."""
    policy = Policy(load_model(folder, torch.float32), PolicyConfig(dtype="float32", **settings)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.hf.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return policy


def encoder_for(folder: Path) -> PromptEncoder:
    """Of short prompts with small images."""
    return PromptEncoder(load_processor(folder), DataConfig(prompt="{question}", min_pixels=1024, max_pixels=1024))


def short_samples(encoder: PromptEncoder, pictures: Path, lengths) -> list[Sample]:
    """Responses of the given lengths to a query with an image, and to one without."""
    queries = [Query("one", "a?", "b", (picture(pictures, 0),)), Query("text", "c?", "d")]
    return samples_for(queries, encoder, lengths)


def batch_for(folder: Path, policy: Policy, pictures: Path, lengths=(2, 3)) -> PackedBatch:
    """The packed batch of `short_samples`."""
    encoder = encoder_for(folder)
    samples = short_samples(encoder, pictures, lengths)
    (bundles,) = plan_micro_batches(samples, budget=100_000, world_size=1)[0]
    return pack(bundles, encoder.encode, encoder.pixels, policy.positions)


def outcome(policy: Policy, batch: PackedBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probs [R] of a batch, and the gradients of a random weighting of them, by parameter."""
    logps, _ = policy(batch)
    weight = torch.randn(len(logps), generator=torch.Generator().manual_seed(0)).to(logps.device)
    policy.zero_grad()
    (logps * weight).sum().backward()
    return logps.detach(), {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


def errors(found, expected) -> tuple[float, float]:
    """Largest difference of log-probs, and largest relative one of a parameter's gradient, between two `outcome`s."""
    assert found[1].keys() == expected[1].keys()
    relative = [((found[1][n] - g).norm() / g.norm().clamp(min=1e-6)).item() for n, g in expected[1].items()]
    return (found[0] - expected[0]).abs().max().item(), max(relative)
