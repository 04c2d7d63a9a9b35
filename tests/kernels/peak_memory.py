"""Peak memory of one training step's forward and backward at a real vocabulary; test_memory.py runs each way."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from rethinker.algorithm.objective import load_loss, loss_inputs
from rethinker.config import AlgorithmConfig, DataConfig, PolicyConfig
from rethinker.data.prompts import PromptEncoder
from rethinker.policy.loading import load_model, load_processor
from rethinker.policy.model import Policy
from rethinker.policy.packing import pack, plan_micro_batches
from rethinker.samples import Query
from rethinker_kernels import policy_loss
from tests.policy.helpers import samples_for

VOCABULARY, LENGTH = 151_936, 64


def main(way: str, responses: int, folder: str, file: str) -> None:
    """
    Args:
        way: `naive` (logits, log_softmax, autograd) or `fused` (the policy as it trains).
        responses: R / LENGTH; R are the rows of the head.
        file: where the bytes beyond the weights, the loss and all gradients go.
    """
    torch.manual_seed(0)
    model = load_model(folder, torch.float32)
    model.resize_token_embeddings(VOCABULARY, mean_resizing=False)
    policy = Policy(model, PolicyConfig(dtype="float32"))
    encoder = PromptEncoder(load_processor(folder), DataConfig())
    config = AlgorithmConfig()
    queries = [Query(str(i), f"is {i} more than two?", "yes") for i in range(8)]
    samples = samples_for(queries, encoder, [LENGTH] * (responses // 8), vocabulary=VOCABULARY)
    ((bundles,),) = plan_micro_batches(samples, budget=10_000, world_size=1)
    batch = pack(bundles, encoder.encode, encoder.pixels, policy.positions)
    objective = loss_inputs(load_loss(config), batch, config, float(responses * LENGTH))
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if way == "naive":
        head = policy.hf.lm_head
        head.forward = lambda rows, index, temperature, objective: (
            head.__class__.__base__.forward(head, rows).log_softmax(-1).gather(-1, index[:, None])[:, 0]
        )
        logps = policy(batch, 1.0, objective)
        objective.pop("nll_weights")
        loss, _ = policy_loss(logps, **objective)
    else:
        loss, *_ = policy(batch, 1.0, objective)
    loss.backward()
    # Not getrusage: its peak counts the process that this one was started from.
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    assert len(batch.target_ids) == responses * LENGTH
    gradients = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    torch.save((peak - before, loss.detach(), gradients), file)
