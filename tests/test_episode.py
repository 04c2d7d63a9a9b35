"""An episode's rollouts, at once and one episode ahead: the same responses, older weights, and a clean end."""

from __future__ import annotations

import math
import threading
import time
from types import SimpleNamespace

import pytest

from rethinker.algorithm.corrections import METRICS
from rethinker.checks import check_geometry
from rethinker.config import AlgorithmConfig, Config, ConfigError, RethinkConfig, RolloutConfig, TrainConfig
from rethinker.data.query_stream import QueryStream
from rethinker.episode import Episodes, MismatchError, score_again
from rethinker.policy.engine import Scores
from rethinker.runtime import signals
from rethinker.runtime.distributed import ALONE, Ranks
from rethinker.runtime.signals import StopRequested
from rethinker.samples import Completion, Group, Prompt, Query

QUERIES = [Query(f"q{i}", "?", "1") for i in range(12)]


class MainThreadRanks(Ranks):
    """Collectives of a single rank, refused off the main thread: there, ranks would meet in any order."""

    def any(self, value):
        assert threading.current_thread() is threading.main_thread()
        return super().any(value)

    def gather(self, value):
        assert threading.current_thread() is threading.main_thread()
        return super().gather(value)


class WithoutState:
    """What has nothing to go on from."""

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class Encoder(WithoutState):
    """Prompts of one token; nothing is left out."""

    def encode(self, query):
        return Prompt(query.id, [1], [1], [])

    def fitting(self, stream):
        return stream.next(1)[0]


class Engine(WithoutState):
    """Answers at once, or when `gate` opens."""

    def __init__(self):
        self.gate, self.started, self.error = threading.Event(), threading.Event(), None
        self.gate.set()

    def generate(self, prompts, *, n, max_new_tokens, temperature, seed):
        self.started.set()
        while not self.gate.wait(0.01):
            signals.check()
        if self.error:
            raise self.error
        return [[Completion([seed % 97, i], [-1.0, -1.0], str(i), "stop") for i in range(n)] for _ in prompts]


class Checker:
    """Every other response is right; from call number `failing` on a reward function fails that must not."""

    def __init__(self):
        self.failures, self.stopping = {}, None
        self.calls, self.failing = 0, math.inf

    def score_all(self, requests, lengths):
        self.calls += 1
        if self.calls >= self.failing:
            self.failures, self.stopping = {"judge: error": 1}, "judge failed"
        return {"boxed": {key: float(text == "1") for key, text, _ in requests}}


def make(**settings) -> tuple[Episodes, Engine]:
    config = Config(rollout=RolloutConfig(group_size=2), train=TrainConfig(episode_queries=3), **settings)
    engine = Engine()
    return Episodes(
        config, QueryStream(QUERIES, seed=0), Encoder(), engine, Checker(), MainThreadRanks(0, 1, 0)
    ), engine


def told(episode):
    """What training sees of an episode's groups."""
    return [
        (group.query.id, group.number, group.rewards, [c.token_ids.tolist() for c in group.completions])
        for group in episode.groups
    ]


def test_an_episode_begun_ahead_is_the_one_sampled_at_once():
    """Same questions in the same order, same seeds, rewards and numbers; only the policy's version is the older one."""
    at_once, _ = make()
    expected = [at_once.take(number, number, {}) for number in range(3)]
    ahead, _ = make()
    got = [ahead.take(0, 0, {})]
    for number in (1, 2):
        ahead.begin(number, number - 1, {})
        ahead.wait({})
        got.append(ahead.take(number, number, {}))
    assert list(map(told, got)) == list(map(told, expected))
    assert [{group.policy_version for group in episode.groups} for episode in got] == [{0}, {0}, {1}]


def test_it_runs_beside_the_training():
    """`begin` returns while the engine samples; the wait counts as rollout."""
    episodes, engine = make()
    engine.gate.clear()
    episodes.begin(0, 0, {})
    assert engine.started.wait(10)
    threading.Timer(1, engine.gate.set).start()
    times = {}
    assert len(episodes.take(0, 1, times).groups) == 3
    assert times["time_rollout_s"] > 0.1
    assert "time_reward_s" not in times


def test_what_was_begun_is_not_part_of_a_checkpoint():
    """A run that goes on from a checkpoint asks the questions of the episode begun ahead again: none is lost."""
    episodes, _ = make()
    episodes.take(0, 0, {})
    episodes.begin(1, 0, {})
    saved = episodes.state_dict()
    episodes.wait({})
    assert episodes.state_dict() == saved
    again = told(episodes.take(1, 1, {}))
    assert episodes.state_dict() != saved
    resumed, _ = make()
    resumed.load_state_dict(saved)
    assert told(resumed.take(1, 1, {})) == again


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("failing", ["first answers", "second passes"])
def test_a_reward_function_that_must_not_fail_gives_the_episode_back(ahead, failing):
    """The data stands where it stood, failures are not counted, and no second pass is sampled for what was not judged;
    asked again, the episode is the very one."""
    episodes, _ = make()
    expected = [told(episodes.take(number, 0, {})) for number in range(2)]
    episodes, _ = make()
    assert told(episodes.take(0, 0, {})) == expected[0]
    before, forced = episodes.state_dict(), []

    def force(groups, prompts, generate, judge, seed):
        forced.append(seed)
        judge([])

    episodes.rethinker = SimpleNamespace(force=force)
    episodes.checker.failing = episodes.checker.calls + (1 if failing == "first answers" else 2)
    if ahead:
        episodes.begin(1, 0, {})
        assert episodes.state_dict() == before
    with pytest.raises(StopRequested):
        episodes.take(1, 0, {})
    assert len(forced) == (failing == "second passes")
    assert episodes.state_dict() == before and not episodes.checker.failures
    episodes.checker = Checker()
    assert told(episodes.take(1, 0, {})) == expected[1]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_stop_breaks_it_off_and_nothing_is_lost(ahead, monkeypatch):
    """A signal ends the sampling, at once or ahead, and the questions are asked again after the resume."""
    episodes, engine = make()
    engine.gate.clear()
    before = episodes.state_dict()
    timer = threading.Timer(0.1, lambda: monkeypatch.setattr(signals._State, "name", "SIGTERM"))
    timer.start()
    if ahead:
        episodes.begin(0, 0, {})
    with pytest.raises(StopRequested):
        episodes.take(0, 0, {})
    timer.join()
    assert episodes.state_dict() == before


def test_a_fault_ahead_ends_the_run_where_it_is_needed():
    """What goes wrong in the thread is raised by `take`, with its own words, and not by `begin` or `wait`."""
    episodes, engine = make()
    engine.error = RuntimeError("no rollout server is left")
    episodes.begin(0, 0, {})
    episodes.wait({})
    with pytest.raises(RuntimeError, match="no rollout server is left"):
        episodes.take(0, 0, {})


def test_the_end_of_a_run_does_not_wait():
    """`close` breaks a rollout off that would take for ever; without one it does nothing."""
    episodes, engine = make()
    engine.gate.clear()
    episodes.begin(0, 0, {})
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "episode 0"]
    start = time.monotonic()
    episodes.close()
    assert not thread.is_alive() and time.monotonic() - start < 5
    episodes.close()


def test_staleness_needs_servers_and_a_correction():
    """Refused with what to set: an engine in the trainer's process, and responses taken for the policy's own."""
    config = Config(rollout=RolloutConfig(max_staleness=1))
    with pytest.raises(ConfigError, match=r"rollout\.max_staleness=1 needs rollout\.backend=server"):
        check_geometry(config)
    config.rollout.backend, config.rollout.servers = "server", ["http://127.0.0.1:1"]
    with pytest.raises(ConfigError, match=r"max_staleness=1 needs algorithm\.rollout_correction, as token_truncate"):
        check_geometry(config)
    config.algorithm = AlgorithmConfig(rollout_correction="token_truncate")
    check_geometry(config)
    config.rethink = RethinkConfig(fraction=0.5)
    check_geometry(config)
    for change in ({"temperature": 0.5}, {"mask_trigger_tokens": False}, {"preset": "released_code"}):
        config.rethink = RethinkConfig(fraction=0.5, **change)
        with pytest.raises(ConfigError, match=r"rollout\.max_staleness=1 .* set rethink\.temperature"):
            check_geometry(config)


def test_rollouts_that_are_all_wrong_are_scored_for_their_mismatch():
    """A step computes no response without an advantage, so weights that are lost would never show."""
    scored, kl = [], 0.5
    policy = SimpleNamespace(score=lambda samples: scored.append(len(samples)) or Scores(kl, []), ranks=ALONE)
    off = dict.fromkeys(METRICS)

    def group(*rewards):
        answers = [Completion([1], [-0.1], "", "stop") for _ in rewards]
        advantages = [reward - sum(rewards) / len(rewards) for reward in rewards]
        return Group(QUERIES[0], answers, 0, rewards=[*rewards], advantages=advantages)

    wrong, mixed = group(0.0, 0.0), group(0.0, 1.0)
    assert score_again([wrong, mixed, wrong], [wrong, mixed], policy, None, Config()) == (None, off) and not scored
    with pytest.raises(MismatchError, match="mismatch_kl=0.5"):
        score_again([wrong, wrong, mixed], [wrong, wrong], policy, None, Config())
    assert scored == [4]  # of the first step's two groups
    kl = float("nan")
    with pytest.raises(MismatchError):  # no step would be skipped for it
        score_again([wrong, wrong, mixed], [wrong, wrong], policy, None, Config())
    kl = 1e-12
    assert score_again([wrong, wrong, mixed], [wrong, wrong], policy, None, Config()) == (kl, off)
