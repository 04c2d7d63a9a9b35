"""Runs whose responses have several turns: trained, recorded, and resumed as others are."""

from __future__ import annotations

import pytest

from rethinker.runtime.completions import read_completions
from tests.integration.interruptions import assert_equal_runs, disturb, finish, prepare, rows
from tests.rollout.dialogues import model_whose_turns_end

ENVIRONMENT = """
from rethinker.environments import Observation


class Closer:
    def reset(self, query):
        return {"query": query, "turns": 0}

    def step(self, state, text):
        state["turns"] += 1
        if "fail" in text:
            raise ValueError("never")
        return Observation("closer: <image>", state["query"].images[:1], done=state["turns"] == 3, reward=0.5, calls=1)
"""
OPTIONS = ("--rethink.fraction", "0", "--rollout.max_new_tokens", "120", "--train.max_generated_tokens", "100000")
TWO_EPISODES = (*OPTIONS, "--train.max_steps", "8")
REPEATABLE = (*OPTIONS, "--environment.use", "[verify]")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("environments")
    prepare(folder)
    model_whose_turns_end(folder / "model")
    (folder / "closer.py").write_text(ENVIRONMENT)
    return folder


@pytest.fixture(scope="module")
def looked(scratch):
    """A run on two ranks with an environment that shows images and gives rewards."""
    use = ["--environment.use", f"[{scratch / 'closer.py'}:Closer]", "--environment.reward_weight", "0.1"]
    finish(scratch, "looked", *TWO_EPISODES, *use, ranks=2)
    return scratch / "looked"


def test_a_run_trains_on_turns_and_says_what_they_were(looked):
    """Law 1 within a run: the policy reads what vLLM read, images between turns included; replay holds trajectories,
    and the reward is the function's and a tenth of the turns'."""
    groups = [group for episode in range(2) for group in read_completions(looked / "completions", episode)]
    responses = [response for group in groups for response in group.completions]
    assert max(len(response.images) for response in responses) == 2
    for group in groups:
        for response, reward, value in zip(group.completions, group.rewards, group.scores["parity"], strict=True):
            given = sum(part.reward for part in response.observed)
            assert reward == pytest.approx(value + 0.1 * given) and given in (0.0, 0.5, 1.0, 1.5)
            assert value == len(response.text) % 2  # of the policy's own words
    found = rows(looked)
    assert len(found) == 8
    for row in found:
        assert row["mismatch_kl"] < 1e-9 and row["skipped"] == 0
        assert 1 < row["turns_mean"] <= 3 and row["tool_calls_mean"] > 0 and 0 < row["tool_use_ratio"] <= 1
    first = [response for group in groups[:16] for response in group.completions]
    assert found[0]["generated_tokens"] == sum(response.sampled_tokens for response in first)
    assert (looked / "report.html").is_file()


def test_another_run_trains_on_what_was_recorded(scratch, looked):
    """rollout.backend=recorded gives the responses with their turns and images, and every step is the same."""
    use = ["--environment.use", f"[{scratch / 'closer.py'}:Closer]", "--environment.reward_weight", "0.1"]
    recording = ["--rollout.backend", "recorded", "--rollout.recording", str(looked / "completions")]
    finish(scratch, "again", *TWO_EPISODES, *use, *recording, "--data.validation", "null", ranks=2)
    for row, expected in zip(rows(scratch / "again"), rows(looked), strict=True):
        for name in ("loss", "grad_norm", "reward_mean", "turns_mean", "replay_size", "trained_pairs", "train_tokens"):
            assert row[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-8), (row["step"], name)


def test_killed_and_resumed_a_run_goes_on_bit_for_bit(scratch):
    """Law 10, with an environment that answers at once: replay and the running episode hold responses of two turns."""
    finish(scratch, "reference", *REPEATABLE)
    print(*disturb(scratch, "killed", kills=1, seed=0, options=REPEATABLE), sep="\n")
    finish(scratch, "killed", "--resume", "auto", *REPEATABLE)
    assert_equal_runs(scratch / "killed", scratch / "reference")
    (first, *_) = read_completions(scratch / "reference" / "completions", 0)
    assert any(part.text for response in first.completions for part in response.observed)
