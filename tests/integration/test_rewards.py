"""Runs with several reward functions: what they log and keep, on two ranks, and a function that stops the run."""

from __future__ import annotations

import json

import pytest

from rethinker.checkpoint.resume import read_state
from rethinker.runtime.completions import read_completions
from tests.integration.interruptions import finish, newest, prepare, rows, start

REWARDS = '''
import os
from pathlib import Path

calls = 0

def parity(response, answer, query, *, switch=""):
    if switch and len(response) % 2 == 0:  # it is asked the same in a validation
        fail(switch)
    return float(len(response) % 2)

def share(responses, answers, queries, tokens):
    return [len(response) / (20 * max(1, n)) for response, n in zip(responses, tokens)]

async def judge(response, answer, query, *, truncated, switch=""):
    """Fails on rank 1 after a while, until a file says that it is repaired."""
    global calls
    calls += 1
    if switch and calls > 20 and os.environ.get("RANK", "1") == "1":
        fail(switch)
    return 1.0 - 0.5 * truncated

def moody(response, answer, query):
    return 1 / (len(response) % 3)

def fail(switch):
    if not Path(switch).exists():
        raise ConnectionError("no answer")
'''

WEIGHTS = {"parity": 1.0, "boxed": 0.25, "form": -0.1, "share": 0.5, "moody": 0.1, "judge": 0.2}
SMALL = ("--rollout.backend", "hf", "--train.max_steps", "4", "--train.episode_queries", "8")
SMALL += ("--rollout.max_new_tokens", "24")  # two episodes of two steps


def functions(folder, first: dict | None = None, last: dict | None = None) -> tuple[str, ...]:
    """The options of a run with six functions; `first` and `last` are further keys of these two."""
    file = folder / "rewards.py"
    entries = [
        {"function": f"{file}:parity"} | (first or {}),
        {"function": "boxed", "weight": 0.25},
        {"function": "format", "name": "form", "weight": -0.1, "pattern": ".*e.*"},
        {"function": f"{file}:share", "weight": 0.5},
        {"function": f"{file}:moody", "weight": 0.1, "on_failure": "zero"},
        {"function": f"{file}:judge", "weight": 0.2, "on_failure": "stop"} | (last or {}),
    ]
    return ("--reward.function", "boxed", "--reward.functions", json.dumps(entries), *SMALL)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    prepare(folder)
    (folder / "rewards.py").write_text(REWARDS)
    return folder


@pytest.fixture(scope="module")
def two(scratch):
    """Two episodes on two ranks that nothing disturbs."""
    finish(scratch, "two", *functions(scratch), ranks=2)
    return scratch / "two"


def assert_equal(run, reference) -> None:
    """Bit for bit: metrics, completions with their scores, and what a checkpoint holds of the run."""
    assert rows(run) == rows(reference) and len(rows(run)) == 4
    for episode in (0, 1):
        one, other = (read_completions(folder / "completions", episode) for folder in (run, reference))
        assert one == other and one[0].scores
    one, other = (read_state(folder / "checkpoints" / "last" / "trainer" / "run") for folder in (run, reference))
    for part in ("progress", "policy", "replay", "data"):
        assert repr(one[part]) == repr(other[part])


def test_rewards_are_weighted_sums_of_what_each_function_says_of_its_response(scratch, two):
    """Law 7, on two ranks: every value is that of this very text, the reward their sum in the order of the list; the
    logged means are those of the functions. One that fails, with on_failure=zero, is counted, named once on a rank, and
    does not stop the run."""
    metrics = rows(two)
    for episode in (0, 1):
        groups = read_completions(two / "completions", episode)
        assert len(groups) == 8
        for group in groups:
            assert list(group.scores) == list(WEIGHTS)
            for i, completion in enumerate(group.completions):
                length = len(completion.text)
                cut = completion.finish_reason == "length"
                expected = {
                    "parity": float(length % 2),
                    "boxed": 0.0,
                    "form": float("e" in completion.text),
                }
                expected |= {"share": length / (20 * max(1, completion.tokens)), "judge": 1.0 - 0.5 * cut}
                expected |= {"moody": 1 / (length % 3) if length % 3 else 0.0}  # else it fails
                assert {name: group.scores[name][i] for name in WEIGHTS} == expected
                assert group.rewards[i] == sum(WEIGHTS[name] * expected[name] for name in WEIGHTS)
        for number, row in enumerate(metrics[2 * episode : 2 * episode + 2]):
            fresh = groups[4 * number : 4 * number + 4]
            for name in WEIGHTS:
                values = [value for group in fresh for value in group.scores[name]]
                assert row["reward_by_function"][name] == pytest.approx(sum(values) / len(values), abs=1e-12)
                differing = sum(len(set(group.scores[name])) > 1 for group in fresh)
                assert row["reward_differs_by_function"][name] == differing / 4
            sums = sum(weight * row["reward_by_function"][name] for name, weight in WEIGHTS.items())
            assert row["reward_mean"] == pytest.approx(sums, abs=1e-12)
            cut = [c.finish_reason == "length" for group in fresh for c in group.completions]
            assert row["truncated_ratio"] == sum(cut) / len(cut)
    # Those of first answers that were replaced count, too, and those of second passes that were not kept.
    failed = [
        len(c.text) % 3 == 0 for e in (0, 1) for g in read_completions(two / "completions", e) for c in g.completions
    ]
    assert metrics[-1]["failed_checks"] >= sum(failed) > 10
    assert (scratch / "two.log").read_text().count("a check of moody scored 0 (error, ZeroDivisionError") in (1, 2)
    assert all(0 < row["reward_std_by_function"]["parity"] <= 0.5 for row in metrics)
    assert metrics[-1]["val_accuracy"] > 0  # of parity alone: no answer is right by the box


def test_a_function_that_fails_on_one_rank_stops_all_and_the_resumed_run_is_the_undisturbed_one(scratch, two):
    """on_failure=stop: saved at the last whole step, one line says what failed, the exit code is not 0; what was not
    judged is asked again, bit for bit (law 10)."""
    switch = scratch / "repaired"
    options = functions(scratch, last={"switch": str(switch)})
    assert start(scratch, "stopped", *options, ranks=2).wait(300) == 2
    run, log = scratch / "stopped", (scratch / "stopped.log").read_text()
    step = len(rows(run))
    assert step == newest(run) == 2
    errors = {line for line in log.splitlines() if line.startswith("error:")}
    assert len(errors) == 1 and "Traceback" not in log
    (line,) = errors
    assert line.startswith("error: reward.functions[5].function=") and ":judge: a check failed (error" in line
    assert "ConnectionError: no answer" in line and "set reward.functions[5].on_failure=zero" in line
    assert line.endswith(f"The run is saved at step {step}: --resume auto goes on there")
    assert not (run / "report.html").exists()

    switch.touch()
    finish(scratch, "stopped", "--resume", "auto", *options, ranks=2)
    assert_equal(run, two)


@pytest.mark.soak
def test_a_validation_that_fails_is_done_by_the_resumed_run(scratch):
    """The first function fails once all steps are done: they are saved, and only the validation is left to do."""
    switch = scratch / "valid"
    switch.touch()
    options = (*functions(scratch, first={"switch": str(switch), "on_failure": "stop"}), "--train.max_steps", "2")
    process = start(scratch, "unvalidated", *options)
    run = scratch / "unvalidated"
    while not (run / "metrics.jsonl").is_file() or not rows(run):  # the episode is judged; its validation is to come
        assert process.poll() is None, (scratch / "unvalidated.log").read_text()[-3000:]
    switch.unlink()
    assert process.wait(300) == 2
    assert len(rows(run)) == newest(run) == 2 and rows(run)[-1]["val_accuracy"] is None
    assert read_state(run / "checkpoints" / "last" / "trainer" / "run")["progress"]["unvalidated"]
    switch.touch()
    finish(scratch, "unvalidated", "--resume", "auto", *options)
    validations = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in validations] == [0, 2] and (run / "report.html").exists()
    assert (run / "checkpoints" / "best" / "model.safetensors").is_file()


def test_truncated_responses_are_not_trained_on(scratch, two):
    """train.mask_truncated in a run: a step's batch has the effective responses that ended by themselves."""
    options = f"""
        --train.mask_truncated true --algorithm.name filter --data.validation null --rethink.fraction 0
        --rollout.backend recorded --rollout.recording {two / "completions"} --algorithm.rollout_correction null
        --rollout.max_mismatch_kl null
    """.split()
    finish(scratch, "masked", *functions(scratch), *options)
    for number, row in enumerate(rows(scratch / "masked")):
        groups = read_completions(scratch / "masked" / "completions", number // 2)[4 * (number % 2) :][:4]
        kept = [
            c.finish_reason != "length" and a != 0
            for g in groups
            for c, a in zip(g.completions, g.advantages, strict=True)
        ]
        assert row["trained_pairs"] == sum(kept) and row["truncated_ratio"] > 0
    assert any(row["trained_pairs"] and row["grad_norm"] > 0 for row in rows(scratch / "masked"))
