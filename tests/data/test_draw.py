"""Drawing by the latest rewards: stated probabilities, exact shares, none twice in an episode, bit for bit again."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import scipy.stats
import torch

from rethinker.checks import check_geometry
from rethinker.config import Config, ConfigError, DataConfig
from rethinker.data.draw import Draw, open_draw, weight_by_difficulty, weight_by_variance
from rethinker.data.mixture import stream_weights
from rethinker.data.query_stream import QueryStream
from rethinker.samples import Group, Query

RATES = (0.5, 0.25, 0.0, 1.0, 0.75)  # of right answers to query i: RATES[i % 5]


def made(count: int, categories: str = "a", **metadata) -> list[Query]:
    return [
        Query(f"q{i}", "?", "1", metadata={"category": categories[i % len(categories)], **metadata})
        for i in range(count)
    ]


def opened(queries: list[Query], seed: int = 0, **settings) -> QueryStream:
    config = DataConfig(**settings)
    return QueryStream(queries, seed=seed, draw=open_draw(queries, config, seed), **stream_weights(queries, config))


def answered(query: Query) -> Group:
    """Four responses, of which RATES are right."""
    right = round(4 * RATES[int(query.id[1:]) % 5])
    return Group(query, [], 0, rewards=[1.0] * right + [0.0] * (4 - right))


def episode(stream: QueryStream, size: int) -> list[str]:
    """The ids of an episode's queries, one drawn after the other as an episode does, and their rewards noted."""
    queries = [query for _ in range(size) for query in stream.next(1)]
    stream.end_episode(map(answered, queries))
    return [query.id for query in queries]


def first_draws(weigh: str, trials: int, queries: list[Query], **settings) -> Counter[str]:
    """How often each query comes first once all have been seen: over `trials` seeds."""
    counts: Counter[str] = Counter()
    for seed in range(trials):
        stream = opened(queries, seed, draw=weigh, draw_uniform=0.0, **settings)
        stream.end_episode(map(answered, queries))
        counts[stream.next(1)[0].id] += 1
    return counts


@pytest.mark.parametrize(
    ("rule", "weights"), [("variance", (0.25, 0.1875, 0, 0, 0.1875)), ("difficulty", (0.5, 0.75, 1, 0, 0.25))]
)
def test_a_query_comes_with_the_probability_of_its_weight(rule, weights):
    """P = weight / sum of weights, exactly 0 of a weight of 0; the test would see one weight that is off by a third."""
    counts = first_draws(rule, 4000, made(5))
    seen = [counts[f"q{i}"] for i in range(5)]

    def p_value(bias: float) -> float:
        expected = np.array([w * (bias if i == 1 else 1) for i, w in enumerate(weights)])
        possible = expected > 0
        expected = 4000 * expected[possible] / expected.sum()
        return scipy.stats.chisquare(np.array(seen)[possible], expected).pvalue

    assert all((count == 0) == (weight == 0) for count, weight in zip(seen, weights, strict=True))
    assert p_value(1.0) > 1e-3 > 1e-6 > p_value(1.35)


def test_later_draws_go_on_without_what_was_taken():
    """The second draw has P(j | i) = w_j / (total - w_i): sequential draws without replacement."""
    pairs: Counter[tuple[str, ...]] = Counter()
    weights = {"q0": 0.25, "q1": 0.1875, "q4": 0.1875}
    for seed in range(4000):
        stream = opened(made(5), seed, draw="variance", draw_uniform=0.0)
        stream.end_episode(map(answered, made(5)))
        pairs[tuple(query.id for _ in range(2) for query in stream.next(1))] += 1
    total = sum(weights.values())
    expected = {(i, j): weights[i] / total * weights[j] / (total - weights[i]) for i in weights for j in weights}
    expected = {pair: 4000 * p for pair, p in expected.items() if pair[0] != pair[1]}
    assert pairs.keys() == expected.keys()
    assert scipy.stats.chisquare([pairs[pair] for pair in expected], list(expected.values())).pvalue > 1e-3


@pytest.mark.parametrize("share", [0.0, 0.25, 0.3, 1.0])
def test_the_uniform_share_follows_the_order(share):
    """In every stretch of the draws that share, to one draw, are the queries that uniform drawing has next."""
    queries = made(4000)
    order = [query.id for query in opened(queries, 3).next(4000)]
    stream = opened(queries, 3, draw="variance", draw_uniform=share)
    stream.end_episode(map(answered, queries))
    drawn = [query.id for query in stream.next(200)]
    followed = []
    for name in drawn:  # a draw by weight is somewhere in 4,000 queries, not next
        followed.append(name == order[0])
        order.remove(name)
    for start in range(0, 200, 40):
        assert abs(sum(followed[start : start + 40]) - 40 * share) <= 1


def test_uniform_is_the_order_without_a_draw():
    """The default builds no draw, and its state has what it always had; with a share of 1 the order is the same."""
    queries = made(30, "abc")
    plain, settings = opened(queries), {"category_weights": {"a": 2, "b": 1}}
    assert open_draw(queries, DataConfig(), 0) is None and plain.state_dict().keys() == {"seed", "sizes", "drawn"}
    assert opened(queries, draw="variance", draw_uniform=1.0).next(30) == plain.next(30)
    assert opened(queries, draw="difficulty", draw_uniform=1.0, **settings).next(20) == opened(
        queries, **settings
    ).next(20)


def test_no_query_twice_in_an_episode_until_all_have_come():
    """Of 20 queries the first 20 of any episode are all of them, whatever the rewards; more than 20 begin again."""
    stream = opened(made(20), draw="variance")
    for _ in range(6):
        ids = episode(stream, 50)
        assert len(set(ids[:20])) == len(set(ids[20:40])) == 20 and len(set(ids[40:])) == 10


def test_weights_that_are_all_zero_follow_the_order():
    """Nothing that differs: an episode is the next stretch of the uniform order."""
    queries = made(40)
    stream, order = opened(queries, draw="variance", draw_uniform=0.0), opened(queries)
    stream.end_episode(Group(query, [], 0, rewards=[1.0, 1.0]) for query in queries)
    assert stream.next(40) == order.next(40)


def test_a_query_never_seen_is_as_good_as_the_best():
    """It has the largest weight that is known, or 1 before any is above 0: among equals each comes as often."""
    draw = Draw(weight_by_variance, 0.0, 0, ["a", "b", "c", "d"], np.full(4, math.nan))
    assert draw._known_or_largest().tolist() == [1, 1, 1, 1]
    draw.end_episode([Group(Query("b", "?", "1"), [], 0, rewards=[1.0, 1.0])])
    assert draw._known_or_largest().tolist() == [1, 0, 1, 1]
    draw.end_episode([Group(Query("c", "?", "1"), [], 0, rewards=[1.0, 0.0])])
    assert draw._known_or_largest().tolist() == [0.25, 0, 0.25, 0.25]


def test_equal_rewards_have_no_variance():
    """Law 8: three times 0.1 has a variance of 1e-34 in floating point, and none here."""
    assert np.var([0.1, 0.1, 0.1]) > 0
    assert weight_by_variance(Group(Query("a", "?", "1"), [], 0, rewards=[0.1, 0.1, 0.1])) == 0.0


def test_difficulty_is_a_probability_whatever_rewards_are():
    """Rewards above 1 and below 0, as of a sum of several, weigh as 1 and 0."""
    weights = [weight_by_difficulty(Group(Query("a", "?", "1"), [], 0, rewards=[r, r])) for r in (-3.0, 0.25, 2.0)]
    assert weights == [1.0, 0.75, 0.0]


def test_pass_rates_are_the_first_weights():
    """p (1 - p) or 1 - p of the column of data.pass_rate, of each source its own; without one nothing is known."""
    queries = made(2, rate=0.25)
    for rule, weight in (("variance", 0.1875), ("difficulty", 0.75)):
        assert open_draw(queries, DataConfig(pass_rate="rate", draw=rule), 0).weights.tolist() == [weight] * 2
    sources = {"x": {"train": "x.jsonl", "pass_rate": "rate"}, "y": {"train": "y.jsonl"}}
    mixed = [Query("x/1", "?", "1", metadata={"rate": 0.5}), Query("y/1", "?", "1")]
    first = open_draw(mixed, DataConfig(train="sources", sources=sources, draw="variance"), 0).weights
    assert first[0] == 0.25 and math.isnan(first[1])


def test_shares_of_labels_stay_exact():
    """Whatever is drawn more often within a category, each has its share of every stretch; the weightless have none."""
    weights = {"a": 3.0, "b": 1.0, "c": 0.0}
    stream = opened(made(60, "abc"), draw="difficulty", draw_uniform=0.25, category_weights=weights)
    categories = {query.id: query.metadata["category"] for query in made(60, "abc")}
    for _ in range(5):
        counts = Counter(categories[name] for name in episode(stream, 8))
        assert counts == {"a": 6, "b": 2}


def test_sources_keep_their_shares():
    """With data.train: sources the draw is within the source whose turn it is."""
    queries = [Query(f"{source}/{i}", "?", "1") for source in "xy" for i in range(10)]
    sources = {"x": {"train": "x.jsonl", "weight": 3}, "y": {"train": "y.jsonl", "weight": 1}}
    stream = opened(queries, draw="variance", train="sources", sources=sources)
    for _ in range(4):
        drawn = stream.next(8)
        assert Counter(query.id[0] for query in drawn) == {"x": 6, "y": 2}
        stream.end_episode(Group(query, [], 0, rewards=[1.0, float(query.id[2:] == "1")]) for query in drawn)


def test_a_resumed_order_is_the_same():
    """Law 10: a stream that goes on from an episode's end, or is given an episode back, draws the very same queries."""
    settings = {"draw": "variance", "draw_uniform": 0.3, "category_weights": {"a": 2, "b": 1}}
    queries = made(40, "ab")
    stream, whole, states = opened(queries, **settings), [], []
    for _ in range(6):
        states.append(stream.state_dict())
        whole.append(episode(stream, 9))
    for number, state in enumerate(states):
        resumed = opened(queries, **settings)
        resumed.peek(4)
        resumed.load_state_dict(state)
        assert [episode(resumed, 9) for _ in range(6 - number)] == whole[number:]
    stream.load_state_dict(states[2])
    stream.next(5)  # and broken off
    stream.load_state_dict(states[2])
    assert torch.equal(stream.state_dict()["weights"].nan_to_num(-1), states[2]["weights"].nan_to_num(-1))
    assert [episode(stream, 9) for _ in range(4)] == whole[2:]


def test_a_look_ahead_changes_nothing():
    """`peek` shows what `next` then gives, draws by weight included."""
    stream = opened(made(40), draw="difficulty")
    episode(stream, 10)
    assert stream.peek(12) == stream.next(12)


def test_a_query_that_is_left_out_is_drawn_in_the_order_alone():
    """What the encoder cannot take has weight 0 from then on, although it was never seen."""
    queries = made(10)
    stream = opened(queries, draw="variance", draw_uniform=0.0)
    for query in queries[:5]:
        stream.leave_out(query)
    assert {query.id for query in stream.next(5)} == {f"q{i}" for i in range(5, 10)}


def test_a_stream_that_holds_no_queries_cannot_weigh_them():
    """data.streaming is refused with what to set."""
    config = Config(data=DataConfig(streaming=True, draw="variance"))
    config.train.max_steps = 1
    with pytest.raises(ConfigError, match=r"data\.draw=variance .* set data\.draw=uniform, or data\.streaming=false"):
        check_geometry(config)
