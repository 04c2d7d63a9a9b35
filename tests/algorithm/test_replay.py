"""ReplayBuffer: law 9 under every rule, eviction, importance weights, and exact checkpoints."""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
from collections import Counter

import pytest
import scipy.stats
import torch

from rethinker.algorithm.replay import ReplayBuffer
from rethinker.config import ConfigError, ReplayConfig
from rethinker.samples import Sample
from tests.algorithm.examples import sample

ALARM = 1e-6


def buffer(seed: int = 0, **settings) -> ReplayBuffer:
    return ReplayBuffer(ReplayConfig(**{"capacity": 100} | settings), seed)


def drawn(replay: ReplayBuffer, n: int) -> list[str]:
    return [each.query.id for each in replay.draw(n)]


@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.0])
def test_draws_follow_the_advantages(alpha):
    """Law 9: P(j) = |A_j|^alpha / sum, signs aside; a 5% error in one probability would be noticed."""
    advantages = [0.5, -1.5, 2.0, -0.25, 1.0]
    replay = buffer(alpha=alpha)
    replay.add([sample(a, str(i)) for i, a in enumerate(advantages)])
    seen = Counter(drawn(replay, 100_000))

    def p_value(bias: float) -> float:
        weights = [abs(a) ** alpha * (bias if i == 2 else 1) for i, a in enumerate(advantages)]
        expected = [w / sum(weights) * 100_000 for w in weights]
        observed = [seen[str(i)] for i in range(len(advantages))]
        return scipy.stats.power_divergence(observed, expected, lambda_="log-likelihood").pvalue

    assert p_value(bias=1.0) > ALARM > p_value(bias=1.05)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("replacement", [True, False])
def test_zero_advantage_is_never_kept_or_drawn(alpha, replacement):
    """Law 9: a sample without advantage has no place in the buffer, also where the draw is uniform."""
    replay = buffer(alpha=alpha, replacement=replacement)
    replay.add([sample(0.0, "zero"), sample(-1.0, "kept"), sample(-0.0, "zero")])
    assert len(replay) == 1 and set(drawn(replay, 1000)) == {"kept"}


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_oldest_leave_at_capacity(alpha):
    """Law 9: beyond `capacity` the oldest go, and none of them is drawn again; also in one oversized add."""
    replay = buffer(capacity=4, alpha=alpha)
    for i in range(7):
        replay.add([sample(100.0 if i < 3 else 1.0, str(i))])
    assert len(replay) == 4 and set(drawn(replay, 2000)) == {"3", "4", "5", "6"}
    replay.add([sample(1.0, str(i)) for i in range(10, 16)])
    assert len(replay) == 4 and set(drawn(replay, 2000)) == {"12", "13", "14", "15"}


def test_the_episode_end_empties_the_buffer():
    """By default nothing outlives its episode, and the next draw is empty, not an endless search."""
    replay = buffer()
    replay.add([sample(1.0), sample(-1.0)])
    replay.end_episode(1)
    assert len(replay) == 0 and replay.draw(5) == []
    replay.add([sample(1.0, "new")])
    assert drawn(replay, 2) == ["new", "new"]


def test_samples_leave_by_age():
    """Kept across episodes, samples more than `max_age` versions old leave; without a limit all stay."""
    replay = buffer(clear_every_episode=False, max_age=1, capacity=3)
    replay.add([sample(50.0, "v0", version=0), sample(1.0, "v1", version=1), sample(1.0, "v2", version=2)])
    replay.end_episode(2)
    assert len(replay) == 2 and set(drawn(replay, 500)) == {"v1", "v2"}
    replay.add([sample(1.0, "v3", version=2), sample(1.0, "v4", version=2)])
    assert set(drawn(replay, 500)) == {"v2", "v3", "v4"}  # the freed place first, then the oldest
    forever = buffer(clear_every_episode=False)
    forever.add([sample(1.0)])
    forever.end_episode(1000)
    assert len(forever) == 1


def test_an_empty_buffer_returns_nothing():
    """No draw loops or fails on an empty buffer, and none is made for n <= 0."""
    assert buffer().draw(10) == [] and buffer(replacement=False).draw(10) == []
    replay = buffer()
    replay.add([sample(1.0)])
    assert replay.draw(0) == [] and replay.draw(-3) == []


def test_without_replacement_no_sample_comes_twice():
    """A draw returns distinct samples, and all of them where more are asked for than there are."""
    replay = buffer(replacement=False)
    replay.add([sample(0.1 * (i + 1), str(i)) for i in range(20)])
    assert len(set(drawn(replay, 15))) == 15
    assert sorted(drawn(replay, 100), key=int) == [str(i) for i in range(20)]


def test_draws_are_whole_samples():
    """A draw keeps its stored advantage, behaviour log-probs and policy version, at weight 1; it is a copy."""
    replay = buffer()
    stored = sample(-1.5, "a", version=7)
    replay.add([stored])
    (got,) = replay.draw(1)
    assert got == stored and got is not stored and got.weight == 1.0


def test_importance_weights_undo_the_priorities():
    """With exponent b, weight = (1 / (n P(j)))^b; b = 1 makes the weighted draw uniform on average."""
    advantages = {"a": 1.0, "b": -3.0, "c": 0.5}
    for exponent in (0.5, 1.0):
        replay = buffer(importance_exponent=exponent)
        replay.add([sample(a, name) for name, a in advantages.items()])
        total = sum(map(abs, advantages.values()))
        draws = replay.draw(200)
        assert {d.query.id for d in draws} == set(advantages)
        for each in draws:
            probability = abs(advantages[each.query.id]) / total
            assert each.weight == pytest.approx((3 * probability) ** -exponent)
    assert all(s.weight == 1.0 for _, samples, _ in replay.state_dict()["entries"] for s in samples)


def test_whole_groups():
    """With unit=group a draw brings all samples of a query, P(group) proportional to its sum of |A|; n is kept."""
    sizes = {1: [1.0, -1.0, 0.5], 2: [2.0, -0.5], 3: [-4.0]}
    replay = buffer(unit="group")
    replay.add([dataclasses.replace(sample(a, str(g)), group=g) for g, values in sizes.items() for a in [*values, 0.0]])
    assert len(replay) == 6
    seen: Counter[int] = Counter()
    for _ in range(4000):
        draws = replay.draw(3)
        assert len(draws) == 3
        first = draws[0].group
        assert [d.advantage for d in draws[: len(sizes[first])]] == sizes[first][:3]
        seen[first] += 1
    total = sum(sum(map(abs, values)) for values in sizes.values())
    expected = [4000 * sum(map(abs, sizes[g])) / total for g in sizes]
    assert scipy.stats.chisquare([seen[g] for g in sizes], expected).pvalue > ALARM
    distinct = buffer(unit="group", replacement=False)
    distinct.add([dataclasses.replace(sample(a, str(g)), group=g) for g, values in sizes.items() for a in values])
    assert sorted(d.advantage for d in distinct.draw(100)) == sorted(a for values in sizes.values() for a in values)


def test_groups_leave_whole_at_capacity():
    """Capacity counts samples; with unit=group the oldest groups leave whole, and one too large for it never enters."""
    replay = buffer(capacity=5, unit="group")
    for number, size in enumerate([2, 2, 3, 6]):
        replay.add([dataclasses.replace(sample(1.0, str(number)), group=number) for _ in range(size)])
        assert len(replay) == [2, 4, 5, 5][number]
    assert {d.group for d in replay.draw(200)} == {1, 2}


def test_age_is_accounted():
    """drawn_age_mean counts the adds since a drawn sample came."""
    replay = buffer()
    replay.add([sample(1.0)])
    replay.draw(3)
    assert replay.drawn_age_mean == 0
    replay.add([sample(1e-9)])
    replay.draw(50)
    assert replay.drawn_age_mean == 1
    replay.end_episode(1)
    assert replay.draw(5) == [] and replay.drawn_age_mean == 0


def test_the_same_seed_draws_the_same_on_every_rank():
    """Two buffers fed alike agree draw for draw; another seed does not."""
    replicas = [buffer(seed) for seed in (3, 3, 4)]
    results = []
    for replay in replicas:
        got = []
        for step in range(5):
            replay.add([sample(1.0 + i, f"{step}.{i}") for i in range(6)])
            got += drawn(replay, 20)
        results.append(got)
    assert results[0] == results[1] != results[2]


def p_value(seen: Counter, weights: dict, bias: float = 1.0, biased: object = None) -> float:
    """Of the counts under probabilities in proportion to `weights`, one of them times `bias`."""
    expected = {name: weight * (bias if name == biased else 1) for name, weight in weights.items()}
    scale = seen.total() / sum(expected.values())
    assert set(seen) <= set(weights)
    return scipy.stats.power_divergence(
        [seen[name] for name in weights], [scale * e for e in expected.values()], lambda_="log-likelihood"
    ).pvalue


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("start", [0, 100_000])
def test_old_samples_are_drawn_less(alpha, start):
    """FreshPER: P(j) in proportion to |A_j|^alpha exp(-age_j / tau), age in adds, also where alpha is 0, and however
    many adds there were before; a 5% error in one probability would be noticed."""
    replay = buffer(alpha=alpha, age_decay=2.0)
    replay._adds = start
    kept = {}
    for number, advantages in enumerate([[4.0, -1.0], [], [-2.0], [0.5, 1.0, -3.0]]):
        samples = [sample(a, f"{number}.{i}") for i, a in enumerate(advantages)]
        kept |= {each.query.id: (abs(each.advantage), 3 - number) for each in samples}
        replay.add(samples)
    weights = {name: size**alpha * math.exp(-age / 2.0) for name, (size, age) in kept.items()}
    seen = Counter(drawn(replay, 100_000))
    assert p_value(seen, weights) > ALARM > p_value(seen, weights, 1.05, "3.2")
    assert p_value(seen, {name: size**alpha for name, (size, _) in kept.items()}) < ALARM


def test_weights_are_the_formula_to_the_trees_precision():
    """Law 9, without chance: whatever was drawn before, every P(j) is the formula's, up to ages of 20 tau: to 1e-6, or
    1e-12 of 1."""
    replay = buffer(capacity=1000, age_decay=3.0, alpha=0.7)
    for number in range(60):
        replay.add([sample((-1) ** i * 10.0 ** (i - 4), f"{number}.{i}") for i in range(8)])
        replay.draw(3)
    formula = [(10.0 ** (i - 4)) ** 0.7 * math.exp(-(59 - number) / 3.0) for number in range(60) for i in range(8)]
    exact = torch.tensor(formula, dtype=torch.float64)
    found = replay._tree.probability(torch.tensor(list(replay._entries)))
    assert torch.allclose(found, exact / exact.sum(), rtol=1e-6, atol=1e-12)


def test_a_sample_of_weight_zero_is_never_drawn():
    """An entry so old that it weighs less than half of the tree's unit cannot be drawn, is not asked for without
    replacement, and does not count in importance weights; it comes back where the younger ones have left."""
    for replacement in (True, False):
        replay = buffer(age_decay=1.0, importance_exponent=1.0, replacement=replacement, clear_every_episode=False)
        replay.add([sample(1e3, "ancient", version=1)])
        for _ in range(100):
            replay.add([])
        replay.add([sample(1e-3, "new", version=0), sample(3e-3, "other", version=0)])
        draws = replay.draw(500)
        assert {each.query.id for each in draws} == {"new", "other"} and len(replay) == 3
        assert len(draws) == (500 if replacement else 2)
        weights = {"new": 2.0, "other": 2 / 3}  # 1 / (2 P): of two entries
        assert all(each.weight == pytest.approx(weights[each.query.id]) for each in draws)
        replay._config.max_age = 0
        replay.end_episode(1)
        assert drawn(replay, 1) == ["ancient"]


def test_ages_beyond_any_float_draw_evenly():
    """A buffer whose samples are all ancient is drawn from as if they were new: only differences of age count."""
    replay = buffer(age_decay=1e-3)
    replay.add([sample(1.0, "a"), sample(3.0, "b")])
    for _ in range(50):
        replay.add([])
    assert p_value(Counter(drawn(replay, 20_000)), {"a": 1.0, "b": 3.0}) > ALARM


def question(name: str, right: int, group: int, nlls: list[float] | None = None, of: int = 4) -> list[Sample]:
    """A group's samples, the first `right` of them right; the lower `nll` are the more probable ones."""
    share = right / of
    return [
        dataclasses.replace(
            sample((1 - share) if i < right else -share, name),
            group=group,
            index=i,
            right=i < right,
            reward=float(i < right),
            correctness=share,
            nll=(nlls or [0.5] * of)[i],
        )
        for i in range(of)
    ]


@pytest.mark.parametrize("unit", ["sample", "group"])
def test_questions_are_drawn_by_their_bucket(unit):
    """ExGRPO: a bucket of questions that are equally often right is drawn in proportion to exp(-(share - 1/2)^2 / 2),
    and its questions evenly; those never or always right are not kept. A 15% error in one would be noticed."""
    replay = buffer(priority="correctness", unit=unit)
    buckets = {"a": 1, "b": 1, "c": 1, "d": 2, "e": 3, "f": 3, "never": 0, "always": 4}
    samples = [question(name, right, number) for number, (name, right) in enumerate(buckets.items())]
    replay.add(list(itertools.chain(*samples)))
    sizes = Counter(buckets.values())
    weights = {
        name: math.exp(-((right / 4 - 0.5) ** 2) / 2) / sizes[right] for name, right in buckets.items() if 0 < right < 4
    }
    draws = replay.draw(100_000)
    slots = {entry.samples[0].query.id: slot for slot, entry in replay._entries.items()}
    exact = [weight / sum(weights.values()) for weight in weights.values()]
    assert replay._tree.probability(torch.tensor([slots[name] for name in weights])).tolist() == pytest.approx(exact)
    seen = Counter(each.query.id for each in draws)
    if unit == "group":
        assert all(count % 4 == 0 for count in seen.values())  # 4 x 25,000 draws: whole groups
        seen = Counter({name: count // 4 for name, count in seen.items()})
    assert p_value(seen, weights) > ALARM > p_value(seen, weights, 1.15, "d")
    assert p_value(seen, {name: weights[name] * sizes[buckets[name]] for name in weights}) < ALARM  # per question
    assert len(replay) == (6 if unit == "sample" else 24)


def test_the_most_probable_right_response_stands_for_its_question():
    """With unit=sample a draw is the right response of the lowest mean -log p, never a wrong one, however probable, nor
    a right one that is pushed down; the first of equals."""
    replay = buffer(priority="correctness")
    replay.add(question("a", 2, 0, nlls=[0.9, 0.3, 0.1, 0.2]) + question("b", 3, 1, nlls=[0.4, 0.4, 0.5, 0.1]))
    pushed = question("c", 2, 2, nlls=[0.1, 0.7, 0.0, 0.0])
    pushed[0].advantage = -0.2
    replay.add([*pushed, dataclasses.replace(question("d", 1, 3)[0], advantage=0.0)])
    assert {(each.query.id, each.index) for each in replay.draw(2000)} == {("a", 1), ("b", 0), ("c", 1)}


def test_a_question_is_kept_as_it_was_answered_last():
    """Its latest group takes an earlier one's place, also within one add, and one that is all right or all wrong just
    removes it; other questions stay."""
    replay = buffer(priority="correctness", unit="group", clear_every_episode=False)
    replay.add(question("a", 1, 0) + question("b", 2, 1) + question("c", 3, 2) + question("b", 3, 3))
    assert {(each.query.id, each.group) for each in replay.draw(500)} == {("a", 0), ("b", 3), ("c", 2)}
    solved = [dataclasses.replace(each, advantage=0.0) for each in question("c", 4, 4)]
    lost = [dataclasses.replace(each, advantage=0.0) for each in question("b", 0, 5)]
    replay.add(solved + lost + question("a", 2, 6))
    assert {(each.query.id, each.group) for each in replay.draw(500)} == {("a", 6)} and len(replay) == 4


def test_buckets_decay_too():
    """Both rules together: the bucket's weight, over its size, times exp(-age / tau)."""
    replay = buffer(priority="correctness", age_decay=1.5)
    replay.add(question("old", 1, 0) + question("older", 3, 1))
    replay.add(question("new", 1, 2))
    bell = math.exp(-1 / 32)
    weights = {"old": bell / 2 * math.exp(-1 / 1.5), "older": bell * math.exp(-1 / 1.5), "new": bell / 2}
    seen = Counter(drawn(replay, 50_000))
    assert p_value(seen, weights) > ALARM > p_value(seen, weights, 1.1, "older")


def test_the_importance_exponent_rises_over_the_run():
    """At progress p it is exponent + p (end - exponent); without an end it stays, whatever the progress."""
    advantages = {"a": 1.0, "b": -3.0}
    expected = [(1.0, 0.0, 0.4), (1.0, 0.25, 0.55), (1.0, 1.0, 1.0), (0.0, 1.0, 0.0), (None, 1.0, 0.4)]
    for end, progress, exponent in expected:
        replay = buffer(importance_exponent=0.4, importance_exponent_end=end)
        replay.add([sample(a, name) for name, a in advantages.items()])
        for each in replay.draw(50, progress):
            chance = abs(advantages[each.query.id]) / 4
            assert each.weight == pytest.approx((2 * chance) ** -exponent)


RULES = (
    {"age_decay": 1.5},
    {"age_decay": 1.5, "alpha": 0.6, "unit": "group"},
    {"priority": "correctness"},
    {"priority": "correctness", "unit": "group", "age_decay": 2.0},
    {"importance_exponent": 0.4, "importance_exponent_end": 1.0},
)


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("replacement", [True, False])
def test_every_rule_goes_on_from_a_checkpoint(rules, replacement):
    """Law 10: draws, weights, ages and sizes of a restored buffer are those of the one that went on, bit for bit."""
    settings = {"capacity": 30, "replacement": replacement, "clear_every_episode": False, "max_age": 3} | rules

    def feed(replay: ReplayBuffer, step: int) -> list:
        members = []
        for i in range(3):
            number = (3 * step + i) % 11  # some come again
            nlls = [0.1 * ((number + j) % 4) for j in range(4)]
            members += question(f"q{number}", (step + number) % 5, 3 * step + i, nlls)
        for each in members:
            each.policy_version = step // 2
        replay.add(members)
        draws = replay.draw(7, progress=step / 12)
        replay.end_episode(step // 2)
        return [(d.group, d.index, d.weight) for d in draws] + [len(replay), replay.drawn_age_mean]

    replay, restored = buffer(**settings), buffer(seed=9, **settings)
    for step in range(6):
        feed(replay, step)
    restored.add(question("stale", 2, 99))
    file = io.BytesIO()
    torch.save(replay.state_dict(), file)
    file.seek(0)
    restored.load_state_dict(torch.load(file, weights_only=False))
    for step in range(6, 12):
        assert feed(replay, step) == feed(restored, step)


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("capacity", [12, 40])  # with 12 samples leave by capacity, with 40 by age
def test_a_checkpoint_continues_the_stream(replacement, capacity):
    """A buffer restored from disk gives the same draws, evictions and later states as the one that went on."""
    settings = {"capacity": capacity, "replacement": replacement, "clear_every_episode": False, "max_age": 2}
    replay = buffer(**settings)
    for version in range(3):
        replay.add([sample(0.3 * (i + 1), f"{version}.{i}", version) for i in range(7)])
        replay.draw(5)
        replay.end_episode(version + 1)
    file = io.BytesIO()
    torch.save(replay.state_dict(), file)
    file.seek(0)
    restored = buffer(seed=99, **settings)
    restored.add([sample(5.0, "stale")])
    restored.load_state_dict(torch.load(file, weights_only=False))
    for version in range(3, 9):
        outcomes = []
        for each in (replay, restored):
            each.add([sample(0.2 * (i + 1), f"{version}.{i}", version) for i in range(5)])
            outcomes.append((drawn(each, 6), len(each)))
            each.end_episode(version + 1)
        assert outcomes[0] == outcomes[1]


def test_a_checkpoint_of_an_older_release_goes_on():
    """One that kept the tree's weights, in other units: they are taken from the samples instead."""
    replay, restored = buffer(), buffer(seed=9)
    replay.add([sample(0.3 * i, str(i)) for i in range(7)])
    state = replay.state_dict()
    restored.load_state_dict(state | {"tree": {"capacity": 100, "leaves": torch.full((100,), 5)}})
    assert drawn(restored, 50) == drawn(replay, 50)


def test_a_saved_state_is_a_copy():
    """Later samples do not reach a state that was taken before."""
    replay = buffer()
    replay.add([sample(1.0, "old")])
    state = replay.state_dict()
    replay.add([sample(100.0, "new")])
    replay.load_state_dict(state)
    assert set(drawn(replay, 100)) == {"old"}


@pytest.mark.parametrize("rules", [{}, {"age_decay": 2.0}])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 2.0**27])
def test_an_advantage_that_cannot_be_weighed_names_its_query(bad, rules):
    """A non-finite or enormous advantage is refused with the setting and the query; the buffer stays as it was."""
    replay = buffer(**rules)
    replay.add([sample(1.0, "fine")])
    with pytest.raises(ConfigError, match=r"replay\.alpha=1\.0.*'broken'"):
        replay.add([sample(1.0), sample(bad, "broken")])
    assert len(replay) == 1 and set(drawn(replay, 50)) == {"fine"}


@pytest.mark.parametrize("unit", ["sample", "group"])
def test_no_rule_takes_an_advantage_that_is_no_number(unit):
    """By correctness, too, NaN is refused by the query's name, though it does not decide a weight."""
    broken = question("broken", 2, 0)
    broken[1] = dataclasses.replace(broken[1], advantage=float("nan"), nll=0.1)
    replay = buffer(priority="correctness", unit=unit)
    with pytest.raises(ConfigError, match="'broken'"):
        replay.add(question("fine", 1, 1) + broken)
    assert len(replay) == 0
