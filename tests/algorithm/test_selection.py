"""select_batch: what grpo, filter and ssr train on, and how many of each."""

from __future__ import annotations

import dataclasses

import pytest

from rethinker.algorithm.advantages import assign_advantages
from rethinker.algorithm.replay import ReplayBuffer
from rethinker.algorithm.selection import Batch, function_metrics, teaches
from rethinker.config import AlgorithmConfig, ConfigError, ReplayConfig
from rethinker.samples import Group
from tests.algorithm.examples import group, select

DIFFER, EQUAL = [1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]


def step(*rewards: list[float], tag: str = "") -> list[Group]:
    groups = [group(r, name=f"{tag}{i}") for i, r in enumerate(rewards)]
    assign_advantages(groups, AlgorithmConfig(), {})
    return groups


@pytest.fixture
def replay() -> ReplayBuffer:
    return ReplayBuffer(ReplayConfig(capacity=1000), seed=0)


def test_grpo_keeps_every_sample_in_order(replay):
    """Zero-advantage samples stay, replay is not touched."""
    groups = step(DIFFER, EQUAL)
    batch = select(groups, name="grpo", pairs=8, replay=replay)
    assert [s.completion for s in batch.samples] == [c for g in groups for c in g.completions]
    assert (batch.replayed, batch.effective_query_ratio, len(replay)) == (0, 0.5, 0)


def test_filter_shrinks_the_batch(replay):
    """Only samples with |A| > 0 are trained; the batch shrinks with effective_query_ratio."""
    for effective in range(5):
        groups = step(*[DIFFER] * effective, *[EQUAL] * (4 - effective))
        batch = select(groups, name="filter", pairs=16, replay=replay)
        assert (len(batch.samples), batch.replayed) == (4 * effective, 0)
        assert batch.effective_query_ratio == effective / 4
        assert all(s.advantage != 0 for s in batch.samples)
    assert len(replay) == 0


def test_a_sample_at_its_groups_mean_is_not_effective(replay):
    """|A| > 0 is asked of each sample: the middle reward of an effective group is dropped."""
    batch = select(step([0.0, 0.5, 1.0]), name="filter", pairs=3, replay=replay)
    assert [s.reward for s in batch.samples] == [0.0, 1.0] and batch.effective_query_ratio == 1.0


def test_ssr_refills_to_exactly_n(replay):
    """METHOD's three steps: the effective enter, N - n_eff are drawn, both are trained: always N = 16 pairs."""
    for number, effective in enumerate([4, 1, 3, 0, 2]):
        groups = step(*[DIFFER] * effective, *[EQUAL] * (4 - effective), tag=f"{number}.")
        stored = len(replay)
        batch = select(groups, name="ssr", pairs=16, replay=replay)
        assert len(batch.samples) == 16
        assert batch.replayed == 16 - 4 * effective
        assert batch.metrics(replay)["replay_fraction"] == 1 - effective / 4
        assert len(replay) == stored + 4 * effective
        assert all(s.advantage != 0 for s in batch.samples)
        assert {s.query.id.split(".")[0] for s in batch.samples[: 4 * effective]} <= {str(number)}


def test_ssr_draws_after_the_effective_samples_entered(replay):
    """In the very first step the only samples to draw are the step's own."""
    batch = select(step(DIFFER, EQUAL, EQUAL), name="ssr", pairs=12, replay=replay)
    assert batch.replayed == 8 and {s.query.id for s in batch.samples} == {"0"}


def test_ssr_with_nothing_to_draw_trains_the_smaller_batch(replay):
    """No effective sample and an empty buffer: an empty batch, at once."""
    batch = select(step(EQUAL, EQUAL), name="ssr", pairs=8, replay=replay)
    assert (batch.samples, batch.replayed) == ([], 0)


def test_ssr_never_draws_a_negative_number(replay):
    """More effective samples than N: all are trained and none is drawn."""
    batch = select(step(DIFFER, DIFFER), name="ssr", pairs=6, replay=replay)
    assert (len(batch.samples), batch.replayed) == (8, 0)


def test_replayed_samples_keep_their_stored_values(replay):
    """A draw of an earlier step has that step's advantage, log-probs and version."""
    (old,) = step([1.0, 0.0, 0.0, 0.0], tag="old")
    old.policy_version = 3
    select([old], name="ssr", pairs=4, replay=replay)
    batch = select(step(EQUAL), name="ssr", pairs=4, replay=replay)
    assert batch.replayed == 4
    for each in batch.samples:
        place = next(i for i, c in enumerate(old.completions) if c is each.completion)
        assert (each.advantage, each.reward, each.policy_version) == (old.advantages[place], old.rewards[place], 3)


def test_metrics_of_a_batch(replay):
    """The histogram counts every trained sample once, zeros in the first bin."""
    select(step([1.0, 0.0, 0.0, 0.0]), name="ssr", pairs=4, replay=replay)
    batch = select(step(DIFFER, EQUAL), name="ssr", pairs=8, replay=replay)
    seen = batch.metrics(replay)
    assert seen["trained_pairs"] == 8 == sum(seen["advantage_histogram"]) and seen["advantage_histogram"][0] == 0
    assert (seen["replay_fraction"], seen["replay_size"], seen["effective_query_ratio"]) == (0.5, 8, 0.5)
    sizes = [abs(sample.advantage) for sample in batch.samples]
    assert sum(sizes[:4]) / 4 == pytest.approx(3**0.5 / 2, rel=1e-5)
    assert seen["advantage_abs_mean"] == pytest.approx(sum(sizes) / 8)
    pair = [dataclasses.replace(sample, weight=w) for sample, w in zip(batch.samples, (0.5, 3.0), strict=False)]
    weighted = sum(sample.weight * sample.advantage for sample in pair) / 2
    assert weighted != 0 and Batch(pair, 0, 1.0).metrics(replay)["advantage_mean"] == pytest.approx(weighted)
    assert 0 <= seen["replay_age_mean"] <= 1
    all_of_them = select(step(DIFFER, EQUAL), name="grpo", pairs=8, replay=replay).metrics(replay)
    assert all_of_them["advantage_histogram"] == [4, 0, 4, 0, 0, 0]
    none = select([], name="filter", pairs=8, replay=replay).metrics(replay)
    assert none["advantage_mean"] == none["advantage_abs_mean"] == 0 == sum(none["advantage_histogram"])


@pytest.mark.parametrize("right", [1, 2, 4, 6, 7])
def test_what_replay_adds_to_the_mean_advantage(right):
    """Where a share p of 8 is right, draws in proportion to |A| have the mean advantage sqrt(7 / 8) (1 - 2 p) / (2
    sqrt(p (1 - p))): they push rare right answers up, and rare wrong ones down. Alpha 0, importance weights and whole
    groups keep the group's own mean, 0."""

    def mean(**settings) -> float:
        replay = ReplayBuffer(ReplayConfig(capacity=1000, **settings), seed=0)
        select(step([1.0] * right + [0.0] * (8 - right)), name="ssr", pairs=8, replay=replay)
        return select([], name="ssr", pairs=8000, replay=replay).metrics(replay)["advantage_mean"]

    p = right / 8
    assert mean() == pytest.approx((7 / 8) ** 0.5 * (1 - 2 * p) / (2 * (p * (1 - p)) ** 0.5), abs=0.05)
    for settings in ({"alpha": 0.0}, {"importance_exponent": 1.0}, {"unit": "group"}):
        assert mean(**settings) == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize("name", ["filter", "ssr"])
def test_too_large_advantages_are_dropped(replay, name):
    """PAD's upper threshold: samples with |A| >= max_advantage are neither trained nor kept, on either side of 0; their
    share of those with an advantage is logged. grpo knows no threshold, and none drops nothing."""
    groups = step([1.0, 0.0, 0.0, 0.0], DIFFER, EQUAL, [0.0, 1.0, 1.0, 1.0])  # |A|: 1.5 and 0.5, 0.87, 0, 0.5 and 1.5
    limit = abs(groups[0].advantages[0])
    for most, left, dropped in ((limit, 10, 2 / 12), (limit + 1e-9, 12, 0.0), (None, 12, 0.0), (0.1, 0, 1.0)):
        buffer = ReplayBuffer(ReplayConfig(capacity=1000), seed=0)
        batch = select(groups, name=name, pairs=12, replay=buffer, max_advantage=most)
        fresh = batch.samples[: len(batch.samples) - batch.replayed]
        assert len(fresh) == left and all(most is None or abs(s.advantage) < most for s in batch.samples)
        assert batch.metrics(buffer)["dropped_by_advantage"] == dropped
        assert len(buffer) == (left if name == "ssr" else 0)
        assert most is None or all(abs(s.advantage) < most for s in buffer.draw(200))
    plain = select(groups, name="grpo", pairs=12, replay=replay)
    assert len(plain.samples) == 16 and plain.metrics(replay)["dropped_by_advantage"] == 0.0


def test_an_advantage_that_is_no_number_is_not_dropped_in_silence(replay):
    """A threshold takes no NaN away: replay still refuses it by the query's name."""
    (one,) = step(DIFFER)
    one.advantages[2] = float("nan")
    with pytest.raises(ConfigError, match="'0'"):
        select([one], name="ssr", pairs=4, replay=replay, max_advantage=2.0)


def numbered(*rewards: list[float], names: str = "abcdefgh", first: int = 0) -> list[Group]:
    groups = [group(r, name) for r, name in zip(rewards, names, strict=False)]
    for number, one in enumerate(groups, start=first):
        one.number, one.nlls = number, [0.1 * (i + 1) for i in range(len(one.completions))]
    assign_advantages(groups, AlgorithmConfig(), {})
    return groups


@pytest.mark.parametrize("unit", ["sample", "group"])
def test_a_solved_question_leaves_replay(unit):
    """ExGRPO's retired set: a question whose latest responses are all right is not drawn any more, whether or not these
    have an advantage, nor is one that never was right; right is 1 or more by the first reward function."""
    replay = ReplayBuffer(ReplayConfig(capacity=1000, priority="correctness", unit=unit), seed=0)
    select(numbered(DIFFER, [0.0, 1.0, 0.9, 0.0], DIFFER, [0.9, 0.0]), name="ssr", pairs=8, replay=replay)
    seen = {s.query.id: s.index for s in replay.draw(200) if s.right}
    assert {s.query.id for s in replay.draw(200)} == {"a", "b", "c"} and seen["b"] == 1
    select(numbered(EQUAL, names="c", first=9), name="ssr", pairs=8, replay=replay)
    assert {s.query.id for s in replay.draw(200)} == {"a", "b"}
    batch = select(numbered([1.0, 1.0, 1.0, 1.1], first=2), name="ssr", pairs=8, replay=replay)
    assert batch.effective_query_ratio == 1.0 and {s.query.id for s in replay.draw(200)} == {"b"}


def test_a_question_whose_responses_are_masked_leaves_replay():
    """Its latest responses were all cut off: none is trained on, and what it was before is not drawn any more."""
    replay = ReplayBuffer(ReplayConfig(capacity=1000, priority="correctness"), seed=0)
    first, again = numbered(DIFFER, DIFFER, DIFFER), numbered(DIFFER, first=5)
    for one in (*first, *again):
        one.truncated = [one in again] * len(one.completions)
    select(first, name="ssr", pairs=8, replay=replay, mask_truncated=True)
    select(again, name="ssr", pairs=8, replay=replay, mask_truncated=True)
    assert {s.query.id for s in replay.draw(200)} == {"b", "c"} and len(replay) == 2


@pytest.mark.parametrize(("unit", "mean"), [("sample", 1.5), ("group", 0.0)])
def test_draws_by_correctness_push_up(unit, mean):
    """Draws of right responses alone have a mean advantage of sqrt((G - 1) / G (1 - p) / p); whole groups keep 0."""
    replay = ReplayBuffer(ReplayConfig(capacity=1000, priority="correctness", unit=unit), seed=0)
    select(numbered([1.0, 0.0, 0.0, 0.0]), name="ssr", pairs=4, replay=replay)
    draws = select([], name="ssr", pairs=800, replay=replay)
    assert draws.metrics(replay)["advantage_mean"] == pytest.approx(mean, abs=1e-5)


def test_progress_reaches_the_importance_exponent():
    """What a step is told of the run's progress is what its draws are weighted by."""
    replay = ReplayBuffer(ReplayConfig(importance_exponent_end=1.0), seed=0)
    select(step([1.0, 0.0, 0.0, 0.0]), name="ssr", pairs=4, replay=replay)
    for progress in (0.0, 0.5):
        batch = select([], name="ssr", pairs=100, replay=replay, progress=progress)
        for sample in batch.samples:
            chance = abs(sample.advantage) / 3  # of 1.5, and 0.5 three times
            assert sample.weight == pytest.approx((4 * chance) ** -progress, rel=1e-4)


def test_no_groups(replay):
    """A step without groups is empty and divides by nothing."""
    batch = select([], name="ssr", pairs=4, replay=replay)
    assert batch.samples == [] and batch.effective_query_ratio == 0.0


def test_wrong_use_is_refused(replay):
    """Groups whose advantages were not assigned do not pass as empty."""
    with pytest.raises(ValueError):
        select([group(DIFFER)], name="grpo", pairs=4, replay=replay)


def test_a_truncated_response_is_never_replayed(replay):
    """With train.mask_truncated it enters neither the buffer nor a batch, though its group is effective; without it
    does."""
    for number in range(20):
        groups = step(DIFFER, DIFFER, EQUAL, tag=f"{number}.")
        for i, one in enumerate(groups):
            one.number = 3 * number + i
            one.truncated = [number % 2 == 0, True, False, i == 1]
        batch = select(groups, name="ssr", pairs=12, replay=replay, mask_truncated=True)
        assert batch.replayed > 0 and batch.effective_query_ratio == pytest.approx(2 / 3)
        for sample in batch.samples:
            even = sample.group // 3 % 2 == 0
            assert sample.index in ({2} if even else {0, 2}) | ({3} if sample.group % 3 == 0 else set())
    assert len(replay) == 20 * 3 + 10 * 2
    assert len(select(groups, name="filter", pairs=0, replay=replay).samples) == 8


def test_what_teaches_with_truncated_responses():
    """Rewards that differ, and with the mask a response that is trained on."""
    differ, equal = step(DIFFER, EQUAL)
    for one in (differ, equal):
        one.truncated = [True] * 4
    assert teaches(differ) and not teaches(equal) and not teaches(differ, mask_truncated=True)
    differ.truncated[2] = False
    assert teaches(differ, mask_truncated=True) and not teaches(equal, mask_truncated=True)


def test_each_function_has_its_own_statistics():
    """Mean and deviation over all fresh responses, and the share of queries where it differs; of one function none."""
    groups = step(DIFFER, EQUAL)
    groups[0].scores = {"boxed": DIFFER, "format": [1.0, 1.0, 1.0, 1.0]}
    groups[1].scores = {"boxed": EQUAL, "format": [0.0, 0.0, 0.0, 0.0]}
    metrics = function_metrics(groups)
    assert metrics["reward_by_function"] == {"boxed": 0.75, "format": 0.5}
    assert metrics["reward_std_by_function"] == pytest.approx({"boxed": 0.1875**0.5, "format": 0.5})
    assert metrics["reward_differs_by_function"] == {"boxed": 0.5, "format": 0.0}
    for one in groups:
        del one.scores["format"]
    assert set(map(str, function_metrics(groups).values())) == {"{}"}
