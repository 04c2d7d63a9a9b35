"""assign_advantages: law 8, and every rule against its paper's formula, written out response by response."""

from __future__ import annotations

import itertools
import random
import statistics

import pytest

from rethinker.algorithm.advantages import assign_advantages
from rethinker.config import AlgorithmConfig
from rethinker.samples import Group
from tests.algorithm.examples import group

BASELINES, SCALES = ("group", "leave_one_out", "batch"), ("std", "none", "batch")


def assign(groups: list[Group], baseline: str = "group", scale: str = "std", device: str = "cpu") -> None:
    config = AlgorithmConfig(advantage_baseline=baseline, advantage_scale=scale)
    assign_advantages(groups, config, {}, device)


def differ(rewards: list[float]) -> bool:
    return max(rewards) != min(rewards)


# The papers' formulas, on rewards as lists of lists


def grpo(groups):
    """DeepSeekMath (2402.03300), section 4.1.2; the sample standard deviation, as trainers take it."""
    return [[(r - statistics.fmean(g)) / statistics.stdev(g) if differ(g) else 0.0 for r in g] for g in groups]


def dr_grpo(groups):
    """Dr. GRPO (2503.20783): the same without the division."""
    return [[r - statistics.fmean(g) for r in g] for g in groups]


def rloo(groups):
    """RLOO (2402.14740): a reward minus the mean of the other samples of its prompt."""
    found = []
    for g in groups:
        others = [g[:i] + g[i + 1 :] for i in range(len(g))]
        found.append([r - statistics.fmean(o) if o else 0.0 for r, o in zip(g, others, strict=True)])
    return found


def normalized(groups):
    """Over the batch: minus its mean, over its standard deviation."""
    every = list(itertools.chain(*groups))
    mean, spread = statistics.fmean(every), statistics.stdev(every)
    return [[(a - mean) / spread for a in g] for g in groups]


def reinforce_pp(groups):
    """REINFORCE++ (2501.03262)."""
    return normalized(groups)


def reinforce_pp_baseline(groups):
    """REINFORCE++ with baseline (2501.03262): the group's mean first, then the batch's mean and deviation."""
    return normalized(dr_grpo(groups))


def gdpo(scores, weights):
    """GDPO (2601.05242): each reward's values in their group, their weighted sum, and that over the batch."""
    parts = {name: grpo(values) for name, values in scores.items()}
    sums = [
        [sum(weights[name] * parts[name][i][j] for name in scores) for j in range(len(g))]
        for i, g in enumerate(next(iter(scores.values())))
    ]
    return normalized(sums)


RULES = {
    ("group", "std"): grpo,
    ("group", "none"): dr_grpo,
    ("leave_one_out", "none"): rloo,
    ("batch", "batch"): reinforce_pp,
    ("batch", "std"): reinforce_pp,
    ("group", "batch"): reinforce_pp_baseline,
    ("leave_one_out", "batch"): lambda groups: normalized(rloo(groups)),
    ("leave_one_out", "std"): lambda groups: [
        [a / (statistics.stdev(g) if differ(g) else 1) for a in of] for g, of in zip(groups, rloo(groups), strict=True)
    ],
    ("batch", "none"): lambda groups: [[r - statistics.fmean(itertools.chain(*groups)) for r in g] for g in groups],
}


def drawn(seed: int) -> list[list[float]]:
    """Ragged groups of binary, of graded and of equal rewards, and one of a single response."""
    rng = random.Random(seed)
    sizes = [rng.randint(2, 8) for _ in range(6)]
    values = [(0.0, 1.0), (0.0, 0.1, 0.5, 1.1), (-1.0, 1.0)]
    return [[rng.choice(values[i % 3]) for _ in range(n)] for i, n in enumerate(sizes)] + [[0.7] * 5, [1.0]]


@pytest.mark.parametrize("rule", RULES, ids="+".join)
@pytest.mark.parametrize("seed", range(3))
def test_every_rule_is_its_papers_formula(rule, seed):
    """Each baseline with each scale: GRPO, Dr. GRPO, RLOO, REINFORCE++ with and without the group's baseline, and what
    lies between them."""
    rewards = drawn(seed)
    groups = list(map(group, rewards))
    assign(groups, *rule)
    for of_group, expected in zip(groups, RULES[rule](rewards), strict=True):
        assert of_group.advantages == pytest.approx(expected, rel=1e-5, abs=1e-12)


def test_the_rules_differ():
    """No two rules of the table are the same on ragged groups, but for the two scales of one batch."""
    found = []
    for rule in RULES:
        groups = list(map(group, drawn(0)))
        assign(groups, *rule)
        found.append(tuple(round(a, 6) for g in groups for a in g.advantages))
    assert len(set(found)) == len(RULES) - 1 and found[3] == found[4]


def scored(scores: dict[str, list[list[float]]], weights: dict[str, float]) -> list[Group]:
    """Groups with several reward functions; the reward is their weighted sum."""
    groups = []
    for values in zip(*scores.values(), strict=True):
        by_name = dict(zip(scores, values, strict=True))
        rewards = [sum(weights[n] * v for n, v in zip(by_name, one, strict=True)) for one in zip(*values, strict=True)]
        groups.append(group(rewards))
        groups[-1].scores = by_name
    return groups


@pytest.mark.parametrize("seed", range(3))
def test_advantages_per_reward_are_gdpo(seed):
    """Two functions of different scale and weight, over ragged groups: the paper's three steps; without the setting
    the weighted sum of the rewards counts, and the functions' values are not read."""
    rng = random.Random(seed)
    right = drawn(seed)
    scores = {"right": right, "short": [[rng.random() * 100 for _ in g] for g in right]}
    scores["short"][2] = [3.0] * len(right[2])  # a group where one function alone differs
    weights = {"right": 1.0, "short": 0.3}
    groups = scored(scores, weights)
    assign_advantages(groups, AlgorithmConfig(advantages_per_reward=True), weights)
    for of_group, expected in zip(groups, gdpo(scores, weights), strict=True):
        assert of_group.advantages == pytest.approx(expected, rel=1e-5, abs=1e-5)
    sums = [g.rewards for g in groups]
    assign_advantages(groups, AlgorithmConfig(), weights)
    for of_group, expected in zip(groups, grpo(sums), strict=True):
        assert of_group.advantages == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_advantages_per_reward_tell_apart_what_the_sum_hides():
    """The paper's example: of two binary rewards, (0, 1) and (0, 2) have one advantage by their sums and two by GDPO.
    Rewards that add up to the same number have an advantage by GDPO alone, so that their query is effective then."""
    scores = {"a": [[0.0, 0.0], [0.0, 1.0]], "b": [[0.0, 1.0], [0.0, 1.0]]}
    groups = scored(scores, {"a": 1.0, "b": 1.0})
    assign_advantages(groups, AlgorithmConfig(), {})
    assert groups[0].advantages == pytest.approx(groups[1].advantages, rel=1e-5)
    assign_advantages(groups, AlgorithmConfig(advantages_per_reward=True), {"a": 1.0, "b": 1.0})
    assert groups[1].advantages[1] == pytest.approx(2 * groups[0].advantages[1])
    even = {"a": [[0.0, 1.0, 0.0], [1.0, 1.0, 1.0]], "b": [[1.0, 0.0, 1.0], [0.2, 0.2, 0.2]]}
    groups = scored(even, {"a": 1.0, "b": 1.0})
    assign_advantages(groups, AlgorithmConfig(), {})
    assert not any(g.effective for g in groups)
    assign_advantages(groups, AlgorithmConfig(advantages_per_reward=True), {"a": 2.0, "b": 1.0})
    assert groups[0].effective and not groups[1].effective and groups[1].advantages == [0.0] * 3
