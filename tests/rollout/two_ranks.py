"""Run by torchrun from test_two_ranks.py: every rank samples its own prompts, before and after a collective sync.

Usage: two_ranks.py <model folder> <result folder> <tensor_parallel_size>
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from rethinker.rollout.backends import make_engine
from rethinker.runtime.distributed import start, stop
from tests.rollout.helpers import Policy, make_prompts, rollout_config


class CollectiveStream(Policy):
    """As under ZeRO-3, no rank can read a weight alone: rank 1's are garbage, and rank 0 broadcasts each."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in super().__iter__():
            if dist.get_rank():
                tensor.fill_(float("nan"))
            dist.broadcast(tensor, src=0)
            yield name, tensor


def main(folder: str, results: str, tensor_parallel_size: int) -> None:
    """Write what this rank saw to results/<rank>.json."""
    ranks = start(timeout_s=120)
    check_sync = tensor_parallel_size == 1
    config = rollout_config(tensor_parallel_size=tensor_parallel_size, check_sync=check_sync)
    engine = make_engine(config, folder, **vars(ranks))
    policy = CollectiveStream(folder)
    own = make_prompts(folder, seed=ranks.rank)[ranks.rank :]  # 4 prompts on rank 0, other 3 on rank 1
    sampling = {"n": 2, "max_new_tokens": 8, "temperature": 1.0}
    errors = [policy.error(own, engine.generate(own, seed=0, **sampling))]
    for version in (1, 2):
        policy.perturb(seed=version)
        engine.sync(policy, version)
        sampled = engine.generate(own, seed=version, **sampling)
        errors.append(policy.error(own, sampled))
    shared = make_prompts(folder, seed=9)
    tokens = [one.token_ids.tolist() for group in engine.generate(shared, seed=3, **sampling) for one in group]
    Path(results, f"{ranks.rank}.json").write_text(
        json.dumps({"errors": errors, "tokens": tokens, "groups": len(sampled)})
    )
    engine.close()
    stop()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
