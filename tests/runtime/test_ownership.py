"""Responses stay with the rank that sampled them, and draws are global: two gloo ranks (law 9, law 3)."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import scipy.stats

from rethinker.runtime.distributed import ALONE
from rethinker.runtime.ownership import collect, share
from rethinker.samples import Completion, RemoteCompletion
from tests.runtime.two_owners import PAIRS, QUERIES, REWARDS, STEPS, rolled_out

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What each of the two ranks saw."""
    folder = tmp_path_factory.mktemp("owners")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.runtime.two_owners", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return [pickle.loads((folder / str(rank)).read_bytes()) for rank in (0, 1)]


def test_both_ranks_draw_the_same_sequence(seen):
    """Fed with outlines of each other's samples, both trees give the same draws, step for step."""
    assert seen[0]["drawn"] == seen[1]["drawn"] and len(seen[0]["drawn"]) == STEPS
    assert seen[0]["drawn"][0] != seen[0]["drawn"][1]


def test_both_ranks_prefer_the_same_responses(seen):
    """Law 3: by correctness and age, too, both draw alike: of each question the right response that was most probable,
    also where the other rank holds it."""
    assert seen[0]["questions"] == seen[1]["questions"]
    probable = {(100 + i, min(range(3), key=lambda j: (i + 3 * j) % 5)) for i in range(len(QUERIES))}
    assert set(seen[0]["questions"][-1]) == probable and {index for _, index in probable} == {0, 1, 2}


def test_the_union_of_the_batches_follows_the_advantages(seen):
    """Law 9 over ranks: together they train exactly the draws, in proportion to |A_j| over all ranks' samples; the test
    has the power to see one probability off by a third."""
    union = Counter((g, i) for rank in seen for g, i, *_ in rank["trained"])
    assert union == Counter(place for step in seen[0]["drawn"] for place in step) and union.total() == STEPS * PAIRS
    sizes = {(g.number, i): abs(a) for g in seen[0]["groups"] for i, a in enumerate(g.advantages)}
    assert all(sizes[g, i] == abs(a) > 0 for rank in seen for g, i, a, _ in rank["trained"])
    sizes = {place: size for place, size in sizes.items() if size > 0}
    assert len(sizes) == 33  # two rewards are their group's mean

    def p_value(bias: float) -> float:
        some = next(place for place, size in sizes.items() if size > 1)
        weights = {place: size * (bias if place == some else 1) for place, size in sizes.items()}
        total = sum(weights.values())
        expected = [union.total() * w / total for w in weights.values()]
        return scipy.stats.power_divergence([union[p] for p in weights], expected, lambda_="log-likelihood").pvalue

    assert p_value(1.0) > 1e-3 > 1e-6 > p_value(1.35)


def test_every_trained_sample_has_its_own_tokens(seen):
    """What travelled is the response that was drawn: token ids and log-probs name their group and index."""
    for rank in seen:
        for group, index, _, completion in rank["trained"]:
            assert completion.token_ids.tolist() == [group - 100, index, 9][: 1 + index % 3]
            assert completion.logprobs.tolist() == [-float(group - 100), -float(index), 0.0][: 1 + index % 3]


def test_tokens_stay_at_home_until_then(seen):
    """Each rank holds the tokens of its own responses only (20 and 15 of 35)."""
    assert [rank["held"] for rank in seen] == [20, 15] and [rank["elsewhere"] for rank in seen] == [15, 20]


def test_one_collective_per_step(seen):
    """All that travels for a step travels in one gather, and none is made when every sample is at home."""
    assert all(rank["collectives"] == STEPS and rank["collectives_at_home"] == 0 for rank in seen)


def test_the_main_rank_can_write_everything(seen):
    """collect brings all completions to rank 0, in the order of the queries; the other rank keeps what it has."""
    texts = [[c.text for c in group.completions] for group in seen[0]["collected"]]
    assert texts == [[f"{i}/{j}" for j in range(5)] for i in range(len(QUERIES))]
    kinds = {type(c) for group in seen[1]["collected"] for c in group.completions}
    assert kinds == {Completion, RemoteCompletion}


def test_groups_are_the_same_everywhere(seen):
    """Order, numbers, owners, rewards and lengths agree on both ranks, and with a single rank's."""
    alone = share(rolled_out(0, 1), QUERIES, first_number=100, ranks=ALONE)
    for rank in (*(r["groups"] for r in seen), alone):
        assert [g.query for g in rank] == QUERIES and [g.number for g in rank] == list(range(100, 107))
        assert [g.rewards for g in rank] == REWARDS
        assert [[c.tokens for c in g.completions] for g in rank] == [[1, 2, 3, 1, 2]] * 7
    assert [g.owner for g in seen[0]["groups"]] == [0, 1, 0, 1, 0, 1, 0] == [g.owner for g in seen[1]["groups"]]
    assert collect(alone, ALONE) is alone
