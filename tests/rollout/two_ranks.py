"""Run by torchrun from test_two_ranks.py: every rank samples its own prompts, before and after a collective sync.

First with an engine per rank, then with one engine over both. Usage: two_ranks.py <model folder> <result folder>
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from rethinker.rollout.engine import make_engine
from rethinker.runtime.distributed import Ranks, start, stop
from tests.rollout.dialogues import Scripted, Side, config_of_dialogues
from tests.rollout.helpers import Policy, make_prompts


class CollectiveStream(Policy):
    """As under ZeRO-3, no rank can read a weight alone: rank 1's are garbage, and rank 0 broadcasts each."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in super().__iter__():
            if dist.get_rank():
                tensor.fill_(float("nan"))
            dist.broadcast(tensor, src=0)
            yield name, tensor


def sample(folder: str, ranks: Ranks, tensor_parallel_size: int) -> dict:
    """What this rank saw."""
    check_sync = tensor_parallel_size == 1
    config = config_of_dialogues(tensor_parallel_size=tensor_parallel_size, check_sync=check_sync)
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
    side = Side(Path(folder), config)
    policy.model.load_state_dict({name: tensor for name, tensor in side.policy.hf.state_dict().items()})
    engine.sync(policy, 3)
    responses = engine.converse(side.begin(Scripted(), each=1 + ranks.rank), temperature=1.0, seed=4)
    talks = [(len(one.observed), one.token_ids.tolist()) for one in responses]
    errors.append(side.gaps(responses).abs().max().item())
    from vllm.distributed.parallel_state import destroy_model_parallel

    destroy_model_parallel()  # the next engine's groups are others; closing this one would end the process group, too
    return {"errors": errors, "tokens": tokens, "groups": len(sampled), "talks": talks}


def main(folder: str, results: str) -> None:
    """Write what this rank saw to results/<rank>.json, one entry per tensor_parallel_size."""
    ranks = start(timeout_s=120)
    seen = {size: sample(folder, ranks, size) for size in (1, 2)}
    Path(results, f"{ranks.rank}.json").write_text(json.dumps(seen))
    stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
