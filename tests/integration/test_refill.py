"""Refill where four of five queries never carry an advantage: full batches, every token counted, laws 3 and 10."""

from __future__ import annotations

import json
import pickle
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from rethinker.algorithm.refill import fill
from rethinker.checks import check_geometry
from rethinker.config import AlgorithmConfig, Config, ConfigError, RolloutConfig, TrainConfig
from rethinker.data.draw import open_draw
from rethinker.data.query_stream import QueryStream
from rethinker.episode import Episodes
from rethinker.rollout.engine import RolloutEngine
from rethinker.rollout.recorded import RecordedEngine
from rethinker.runtime import distributed, signals
from rethinker.runtime.completions import read_completions, write_completions
from rethinker.runtime.distributed import ALONE, Ranks
from rethinker.runtime.signals import StopRequested
from rethinker.samples import Group, Query
from tests import forked
from tests.integration.interruptions import assert_equal_runs, finish, kill, newest, prepare, rows, start, wait_for
from tests.test_episode import Encoder, Engine

QUERIES = [Query(f"q{i}", "?", "1") for i in range(100)]
SIZE = 8


class Checker:
    """Of every fifth query the responses differ in reward; of all others none is right."""

    def __init__(self):
        self.failures, self.stopping = {}, None

    def score_all(self, requests, lengths):
        return {"boxed": {key: float(text == "1" and int(query.id[1:]) % 5 == 0) for key, text, query in requests}}


class Counting(Engine):
    """Remembers what it was asked, and is told to stop in its request number `stop`."""

    def __init__(self, stop: int | None = None):
        super().__init__()
        self.asked, self.stop = [], stop

    def generate(self, prompts, **sampling):
        self.asked.append((len(prompts), sampling["seed"]))
        if len(self.asked) == self.stop:
            signals._State.name = "SIGTERM"
            signals.check()
        return super().generate(prompts, **sampling)


def make(
    rounds: int, *, ranks: Ranks = ALONE, draw: str = "variance", engine: RolloutEngine | None = None
) -> tuple[Episodes, Counting]:
    config = Config(rollout=RolloutConfig(group_size=2), train=TrainConfig(episode_queries=SIZE))
    config.algorithm, config.data.draw = AlgorithmConfig(refill_rounds=rounds), draw
    stream, engine = QueryStream(QUERIES, seed=0, draw=open_draw(QUERIES, config.data, 0)), engine or Counting()
    return Episodes(config, stream, Encoder(), engine, Checker(), ranks), engine


def of_fifth(groups: list[Group]) -> list[bool]:
    return [int(group.query.id[1:]) % 5 == 0 for group in groups]


def seen(episodes: Episodes, number: int, needed: int | None = None) -> tuple:
    """What any rank knows of an episode: its groups and the dropped ones, by name."""
    episode = episodes.take(number, number, {}, needed)
    named = [[(g.query.id, g.number, g.rewards) for g in groups] for groups in (episode.groups, episode.dropped)]
    return *named, episode.rounds


def test_an_episode_is_full_of_effective_groups():
    """Every group kept has an advantage, none is sampled twice, numbers and seeds are used once, and the dropped groups
    keep their tokens and come with the kept ones in the order of sampling."""
    episodes, engine = make(rounds=12)
    numbers = []
    for number in range(2):
        episode = episodes.take(number, number, {})
        assert len(episode.groups) == SIZE and all(of_fifth(episode.groups)) and episode.rounds > 1
        assert sum(size for size, _ in engine.asked) == len(numbers) + len(episode.sampled)
        assert len({group.query.id for group in episode.sampled}) == len(episode.sampled)
        assert all(size <= SIZE for size, _ in engine.asked)
        assert all(group.sampled_tokens == 4 for group in episode.dropped)
        numbers += [group.number for group in episode.sampled]
        known = episodes.stream.state_dict()["weights"]  # of the dropped ones, too
        assert all(known[int(group.query.id[1:])] == np.var(group.rewards) for group in episode.sampled)
    assert numbers == sorted(set(numbers))
    assert len({seed for _, seed in engine.asked}) == len(engine.asked)


def test_without_refill_nothing_is_dropped():
    """The default keeps all groups, numbered as they always were, and asks once."""
    episodes, engine = make(rounds=0, draw="uniform")
    for number in range(2):
        episode = episodes.take(number, number, {}, 3)
        assert [group.number for group in episode.groups] == list(range(number * SIZE, (number + 1) * SIZE))
        assert (episode.dropped, episode.rounds) == ([], 0)
    assert [size for size, _ in engine.asked] == [SIZE, SIZE]
    assert [g.query for g in episode.groups] == QueryStream(QUERIES, seed=0).next(2 * SIZE)[SIZE:]


def test_too_few_rounds_fill_up_and_say_so_once(caplog):
    """After the last round groups without an advantage fill up: as many groups as ever, and one warning."""
    episodes, _ = make(rounds=1, draw="uniform")
    for number in range(3):
        episode = episodes.take(number, number, {})
        effective = sum(of_fifth(episode.sampled))
        assert len(episode.groups) == SIZE and sum(of_fifth(episode.groups)) == effective < SIZE
        assert (episode.groups, episode.dropped) == fill(episode.sampled, SIZE) and episode.rounds == 1
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith("algorithm.refill_rounds=1: after the last round ")


def test_the_last_episode_samples_what_the_steps_need():
    """With three groups left to train on, three are kept, and no round asks for more than three."""
    episodes, engine = make(rounds=30, draw="uniform")
    episode = episodes.take(0, 0, {}, 3)
    assert len(episode.groups) == 3 and all(of_fifth(episode.groups))
    assert max(size for size, _ in engine.asked) == engine.asked[0][0] == 3


@pytest.mark.parametrize("draw", ["uniform", "variance"])
@pytest.mark.parametrize("stop", [2, 3])  # within refill, behind one or two rounds that are rewarded
def test_a_stop_within_a_refill_gives_the_episode_back(draw, stop, monkeypatch):
    """Its first rounds, too: data, weights and counts stand as before, and resumed it is the very same episode."""
    monkeypatch.setattr(signals._State, "name", None)
    whole, _ = make(rounds=12, draw=draw)
    expected = [seen(whole, number) for number in range(3)]
    assert expected[1][2] >= 2
    first, engine = make(rounds=12, draw=draw)
    assert seen(first, 0) == expected[0]
    before = first.state_dict()
    engine.stop = len(engine.asked) + stop
    with pytest.raises(StopRequested):
        first.take(1, 1, {})
    assert len(engine.asked) == engine.stop and repr(first.state_dict()) == repr(before)
    monkeypatch.setattr(signals._State, "name", None)
    resumed, _ = make(rounds=12, draw=draw)
    resumed.load_state_dict(first.state_dict())
    assert [seen(resumed, number) for number in (1, 2)] == expected[1:]


def test_a_recording_replays_the_refill(tmp_path):
    """The recorded backend is asked for the dropped groups again, and they are dropped again."""
    recorded, _ = make(rounds=12)
    expected = []
    for number in range(3):
        episode = recorded.take(number, number, {})
        write_completions(tmp_path, number, episode.sampled)
        expected.append([[(g.query.id, g.completions) for g in groups] for groups in (episode.groups, episode.dropped)])
    replayed, _ = make(rounds=12, engine=RecordedEngine(Config(rollout=RolloutConfig(recording=str(tmp_path)))))
    for number in range(3):
        episode = replayed.take(number, number, {})
        got = [[(g.query.id, g.completions) for g in groups] for groups in (episode.groups, episode.dropped)]
        assert got == expected[number]


def on_a_rank(folder: str) -> None:
    ranks = distributed.start(60)
    episodes, engine = make(rounds=12, ranks=ranks)
    found = [seen(episodes, number, needed) for number, needed in enumerate((None, None, 5))]
    (Path(folder) / str(ranks.rank)).write_bytes(pickle.dumps((found, engine.asked)))
    distributed.stop()


def test_two_ranks_refill_as_one(tmp_path):
    """Law 3: on two ranks both come to the queries, groups and rounds of one rank, given the same rewards."""
    forked.run(partial(on_a_rank, str(tmp_path)), tmp_path / "log", ranks=2)
    (one, asked), (other, asked_too) = (pickle.loads((tmp_path / str(rank)).read_bytes()) for rank in (0, 1))
    alone, engine = make(rounds=12)
    assert one == other == [seen(alone, number, needed) for number, needed in enumerate((None, None, 5))]
    assert [a + b for (a, _), (b, _) in zip(asked, asked_too, strict=True)] == [size for size, _ in engine.asked]
    assert not {seed for _, seed in asked} & {seed for _, seed in asked_too}


def test_rounds_need_collectives():
    """An episode that is sampled in a thread cannot be refilled: refused with what to set."""
    config = Config(rollout=RolloutConfig(max_staleness=1, backend="server", servers=["http://127.0.0.1:1"]))
    config.algorithm = AlgorithmConfig(rollout_correction=2.0, refill_rounds=3)
    with pytest.raises(ConfigError, match=r"algorithm\.refill_rounds=3 needs rollout\.max_staleness=0"):
        check_geometry(config)


# Responses that differ have rewards that do, for every fifth question; each judged question's id is noted.
REWARD = """
import os
import zlib

def one_in_five(response, answer, query):
    with open({judged!r}, "a") as file:
        file.write(query.id + "\\n")
    return zlib.crc32(response.encode()) / 2**31 if query.id in {effective!r} else 0.0
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """The folder of the runs, the ids of the questions whose rewards differ, and the settings."""
    folder = tmp_path_factory.mktemp("refill")
    prepare(folder, questions=160)
    ids = [json.loads(line)["id"] for line in (folder / "questions.jsonl").read_text().splitlines()]
    effective, judged = set(ids[::5]), str(folder / "judged")
    (folder / "one_in_five.py").write_text(REWARD.format(judged=judged, effective=effective))
    options = f"""
        --reward.function {folder / "one_in_five.py"}:one_in_five --rollout.backend hf --rethink.fraction 0
        --train.episode_queries {SIZE} --train.batch_pairs 8 --algorithm.refill_rounds 12 --data.draw variance
        --train.max_generated_tokens 100000
    """.split()
    return folder, effective, options


@pytest.fixture(scope="module")
def reference(task):
    """The run that nobody disturbs."""
    folder, _, options = task
    finish(folder, "reference", *options)
    return folder / "reference"


def test_every_batch_is_full_and_every_token_counted(task, reference):
    """Although four of five queries have equal rewards every step trains on effective ones alone; the metrics count
    what was sampled for it, and the completions hold all of it, the dropped ones without an advantage."""
    _, effective, _ = task
    logged, tokens = rows(reference), 0
    assert len(logged) == 12
    for number in range(3):
        groups = read_completions(reference / "completions", number)
        tokens += sum(completion.tokens for group in groups for completion in group.completions)
        kept = [group for group in groups if group.advantages]
        assert len(kept) == SIZE and {group.query.id for group in kept} <= effective
        count = sum(group.query.id in effective for group in groups)
        for row in logged[4 * number : 4 * number + 4]:
            assert row["effective_query_ratio"] == 1.0 and row["trained_pairs"] == 8 and row["replay_fraction"] == 0.0
            assert row["generated_tokens"] == tokens
            assert row["sampled_queries"] == len(groups) > SIZE and row["refill_rounds"] >= 1
            assert row["sampled_effective_ratio"] == count / len(groups) < 1


def test_killed_and_stopped_within_a_refill(task, reference):
    """Law 10: stopped within the second episode's refill and killed within the third's, the run is the undisturbed one
    bit for bit."""
    folder, _, options = task
    run, judged = folder / "disturbed", folder / "judged"
    for steps, end in ((4, lambda process: process.send_signal(signal.SIGTERM)), (8, kill)):
        process = start(folder, "disturbed", "--resume", "auto", *options)
        wait_for(lambda: len(rows(run)) == steps, process)  # noqa: B023  (it is awaited here)
        judged.write_text("")
        wait_for(lambda: len(set(judged.read_text().split())) > SIZE, process)  # more than one round of the episode
        end(process)
        process.wait(60)
        assert len(rows(run)) == steps == newest(run), (folder / "disturbed.log").read_text()[-2000:]
    finish(folder, "disturbed", "--resume", "auto", *options)
    assert_equal_runs(run, reference)
