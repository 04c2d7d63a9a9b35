"""The recorded backend gives an earlier run's completions back, query by query."""

from __future__ import annotations

import pytest

from rethinker.config import ConfigError
from rethinker.rollout.engine import make_engine
from rethinker.runtime.completions import write_completions
from rethinker.samples import Completion, Group, Prompt, Query
from tests.rollout.helpers import rollout_config


def group(query_id: str, episode: int, size: int = 2) -> Group:
    """A group whose tokens say where it is from."""
    completions = [
        Completion([episode, i, 9], [-0.1 * (i + 1), -1 / 3, -0.25], f"{query_id}/{episode}/{i}", "stop")
        for i in range(size)
    ]
    return Group(Query(query_id, "question", "answer"), completions, policy_version=episode)


def ask(engine, *query_ids: str, n: int = 2):
    """The engine's completions of these queries."""
    prompts = [Prompt(query_id, [1], [1], []) for query_id in query_ids]
    return engine.generate(prompts, n=n, max_new_tokens=8, temperature=1.0, seed=0)


@pytest.fixture
def engine(tmp_path):
    """Two episodes: a, b, c in the first, b again in the second."""
    write_completions(tmp_path, 0, [group("a", 0), group("b", 0), group("c", 0)])
    write_completions(tmp_path, 1, [group("b", 1)])
    config = rollout_config(backend="recorded", recording=str(tmp_path))
    return make_engine(config, "unused", rank=0, world_size=1, local_rank=0)


def test_round_trip_by_query_in_order_of_episodes(engine):
    """Tokens, log-probs and texts are exactly the recorded ones, whatever order the queries are asked in."""
    assert ask(engine, "b", "a") == [group("b", 0).completions, group("a", 0).completions]
    engine.sync(None, 1)
    assert ask(engine, "b", "c") == [group("b", 1).completions, group("c", 0).completions]


def test_what_is_not_recorded_is_an_error(engine):
    """An unknown query, one asked too often, another group size: the errors name rollout.recording and the way out."""
    with pytest.raises(ConfigError, match=r"rollout\.recording=.* of query 'x'.*data\.validation=null"):
        ask(engine, "x")
    with pytest.raises(ConfigError, match=r"rollout\.group_size=2"):
        ask(engine, "a", n=4)
    ask(engine, "a")
    with pytest.raises(ConfigError, match=r"of query 'a'"):
        ask(engine, "a")
