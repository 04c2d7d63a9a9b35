"""assign_advantages: law 8, and every rule against its paper's formula, written out response by response."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest

from rethinker.algorithm.advantages import assign_advantages
from rethinker.algorithm.replay import ReplayBuffer
from rethinker.algorithm.selection import select_batch
from rethinker.config import AlgorithmConfig, ConfigError, ReplayConfig
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


def test_advantages_per_reward_need_functions():
    """One line that names what is missing."""
    with pytest.raises(ConfigError, match=r"^algorithm\.advantages_per_reward=true needs reward\.functions"):
        assign_advantages([group([0.0, 1.0])], AlgorithmConfig(advantages_per_reward=True), {})


@pytest.mark.parametrize("baseline", ["group", "leave_one_out"])
@pytest.mark.parametrize("scale", SCALES)
def test_groups_of_equal_rewards_get_zeros(scale, baseline):
    """Law 8: equal rewards, whatever their value, and G = 1 are not effective and get exact zeros."""
    rewards = [[0.1] * 7, [1.0, 0.0], [0.7], [0.0] * 8, [1 / 3] * 3]
    groups = list(map(group, rewards))
    assert [each.effective for each in groups] == [False, True, False, False, False]  # by the rewards
    assign(groups, baseline, scale)
    assert [each.effective for each in groups] == [False, True, False, False, False]  # by the advantages
    for each in groups:
        assert any(a != 0 for a in each.advantages) == differ(each.rewards)
        assert all(math.isfinite(a) for a in each.advantages)


@pytest.mark.parametrize("scale", SCALES)
def test_the_baseline_of_the_batch_knows_no_groups(scale):
    """A query whose responses are all right has an advantage by the episode's mean, is effective, and enters filter
    and replay; an episode of equal rewards has exact zeros."""
    groups = [group([1.0, 1.0]), group([0.0, 0.0]), group([1.0])]
    assign(groups, "batch", scale)
    assert [g.advantages[0] > 0 for g in groups] == [True, False, True] and all(g.effective for g in groups)
    replay = ReplayBuffer(ReplayConfig(), seed=0)
    batch = select_batch(groups, name="ssr", pairs=5, replay=replay)
    assert (len(batch.samples), batch.replayed, len(replay), batch.effective_query_ratio) == (5, 0, 5, 1.0)
    assert len(select_batch(groups, name="filter", pairs=5, replay=replay).samples) == 5
    equal = [group([0.1] * 3), group([0.1] * 4)]
    assign(equal, "batch", scale)
    assert all(g.advantages == [0.0] * len(g.rewards) and not g.effective for g in equal)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("scale", SCALES)
def test_rewards_that_differ_in_the_last_bit_are_effective(scale, baseline):
    """Law 8: degenerate is max == min: 0.1 + 0.2 and 0.3 differ."""
    near = group([0.1 + 0.2, 0.3, 0.3, 0.3])
    assign([near], baseline, scale)
    assert near.effective and near.advantages[0] > 0 > near.advantages[1]
    assert max(map(abs, near.advantages)) < 1e-6  # a difference of rounding stays a small advantage


@pytest.mark.parametrize("baseline", BASELINES)
def test_no_groups_and_empty_ones(baseline):
    """An episode without a response has no advantages, and is no fault."""
    assign([], baseline)
    groups = [group([]), group([1.0, 0.0])]
    assign(groups, baseline, "batch")
    assert groups[0].advantages == [] and not groups[0].effective and groups[1].effective


@pytest.mark.gpu
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("scale", SCALES)
def test_a_gpu_assigns_the_same_advantages(scale, baseline):
    """On CUDA: the CPU's advantages to rounding, its exact zeros, its effective groups, also where rewards differ in
    the last bit of fp64 only."""
    rewards = [[0.1] * 7, [1.0, 0.0], [0.7], [0.1 + 0.2, 0.3, 0.3, 0.3], [1 / 3] * 3, [0.0, 0.5, 1.0], [1e-300, 0.0]]
    groups = {device: list(map(group, rewards)) for device in ("cpu", "cuda")}
    for device in groups:
        assign(groups[device], baseline, scale, device)
    for ours, theirs in zip(groups["cuda"], groups["cpu"], strict=True):
        assert ours.advantages == pytest.approx(theirs.advantages, rel=1e-7, abs=0)
        assert ours.effective == theirs.effective
