"""Run under torchrun by test_ownership.py: two ranks share groups, draw from replay and fetch what they train.

Usage: torchrun --nproc-per-node 2 -m tests.runtime.two_owners FOLDER; each rank pickles what it saw to FOLDER/<rank>.
"""

from __future__ import annotations

import pickle
import sys
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from rethinker.algorithm.advantages import assign_advantages
from rethinker.algorithm.replay import ReplayBuffer
from rethinker.config import AlgorithmConfig, ReplayConfig
from rethinker.policy.packing import plan_micro_batches
from rethinker.runtime import distributed
from rethinker.runtime.ownership import collect, fetch, share
from rethinker.samples import Completion, Group, Query, RemoteCompletion

QUERIES = [Query(f"q{i}", "?", "!") for i in range(7)]  # an odd number: rank 0 holds one more
REWARDS = [[1.0, 0.0, 0.0, 0.0, 0.25 * (i % 3)] for i in range(7)]
STEPS, PAIRS = 40, 250


def rolled_out(rank: int, world_size: int) -> list[Group]:
    """This rank's groups; a response's tokens say whose it is."""
    return [
        Group(
            QUERIES[i],
            [
                Completion([i, j, 9][: 1 + j % 3], [-float(i), -float(j), 0.0][: 1 + j % 3], f"{i}/{j}", "stop")
                for j in range(5)
            ],
            policy_version=2,
            prompt_tokens=4 + i,
            rewards=REWARDS[i],
            rethinks=[False] * 5,
            nlls=[(i + 3 * j) % 5 / 7 for j in range(5)],
        )
        for i in range(rank, len(QUERIES), world_size)
    ]


def main(folder: str) -> None:
    ranks = distributed.start(60)
    groups = share(rolled_out(ranks.rank, ranks.world_size), QUERIES, first_number=100, ranks=ranks)
    assign_advantages(groups, AlgorithmConfig(), {})
    replay = ReplayBuffer(ReplayConfig(), seed=5)
    replay.add([sample for group in groups for sample in group.samples()])
    held = sum(isinstance(c, Completion) for group in groups for c in group.completions)

    collectives = [0]
    gather = dist.all_gather_object

    def counted(*args, **kwargs):
        collectives[0] += 1
        gather(*args, **kwargs)

    dist.all_gather_object = counted
    drawn, trained = [], []
    for _ in range(STEPS):
        draws = replay.draw(PAIRS)
        plan = plan_micro_batches(draws, budget=400, world_size=ranks.world_size)
        drawn.append([(s.group, s.index) for s in draws])
        for bundles in fetch(plan, ranks):
            trained += [(s.group, s.index, s.advantage, s.completion) for b in bundles for s in b.samples]
    in_steps = collectives[0]
    partly = [replace(group, rewards=[1.0, 1.0, 1.0, 0.0, 0.0]) for group in groups]
    assign_advantages(partly, AlgorithmConfig(), {})
    by_correctness = ReplayBuffer(ReplayConfig(priority="correctness", age_decay=3.0), seed=6)
    questions = []
    for group in partly:
        by_correctness.add(group.samples())
        questions.append([(s.group, s.index) for s in by_correctness.draw(PAIRS)])
    fetch([[[b for b in bundles if b.samples[0].owner == r] for bundles in plan[r]] for r in (0, 1)], ranks)
    whole = collect(groups, ranks)
    seen = {
        "drawn": drawn,
        "questions": questions,
        "trained": trained,
        "held": held,
        "elsewhere": sum(isinstance(c, RemoteCompletion) for group in groups for c in group.completions),
        "collectives": in_steps,
        "collectives_at_home": collectives[0] - in_steps,
        "groups": groups,
        "collected": whole,
    }
    (Path(folder) / str(ranks.rank)).write_bytes(pickle.dumps(seen))
    distributed.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
