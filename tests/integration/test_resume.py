"""Law 10: killed at any instant and resumed, a run goes on bit for bit; asked to stop, it saves itself first."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time

import pytest

from tests.integration.interruptions import (
    STEPS,
    assert_equal_runs,
    disturb,
    finish,
    newest,
    prepare,
    rows,
    start,
    wait_for,
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    prepare(folder)
    return folder


@pytest.fixture(scope="module")
def reference(scratch):
    """The run that nobody disturbs."""
    finish(scratch, "reference")
    return scratch / "reference"


def test_the_reference_moves_after_every_second_episode(reference):
    """With four steps an episode the KL is 0, to rounding, in the first step and in the ninth, and in no other."""
    for row in rows(reference):
        assert (row["kl"] < 1e-9) == (row["step"] in (1, 9)), (row["step"], row["kl"])


def test_killed_anywhere_in_a_step_and_in_a_save(scratch, reference):
    """Two SIGKILLs: within an episode, and while a checkpoint is being written."""
    print(*disturb(scratch, "killed", kills=2, seed=0), sep="\n")
    finish(scratch, "killed", "--resume", "auto")
    assert_equal_runs(scratch / "killed", reference)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_twenty_kills(scratch, reference):
    """Twenty SIGKILLs over a run of twelve steps; if it ends before, over another one. Each ends as undisturbed."""
    kills, number = 0, 0
    while kills < 20:
        lines = disturb(scratch, f"twenty_{number}", kills=20 - kills, seed=number)
        print(f"run {number}:", *lines, sep="\n", flush=True)
        finish(scratch, f"twenty_{number}", "--resume", "auto")
        assert_equal_runs(scratch / f"twenty_{number}", reference)
        kills, number = kills + len(lines), number + 1


def test_asked_to_stop(scratch, reference):
    """SIGTERM within an episode: the step ends, everything is saved, exit code 0; the rest is bit for bit the same.

    A second stop falls into a rollout: what was sampled is thrown away and sampled again.
    """
    run = scratch / "stopped"
    process = start(scratch, "stopped")
    wait_for(lambda: len(rows(run)) >= 5, process)
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    assert process.wait(60) == 0
    print(f"SIGTERM in a step: saved and ended after {time.monotonic() - asked:.1f} s")
    steps = len(rows(run))
    assert 5 <= steps < STEPS and newest(run) == steps
    log = (scratch / "stopped.log").read_text()
    assert f"SIGTERM: saved after step {steps}/{STEPS}" in log and "--resume auto" in log
    assert not (run / "report.html").exists()

    process = start(scratch, "stopped", "--resume", "auto", "--train.micro_batch_tokens", "16383")  # it may change
    wait_for(lambda: len(rows(run)) >= 8, process)
    time.sleep(0.05)  # in the rollout of the last episode
    process.send_signal(signal.SIGINT)
    asked = time.monotonic()
    assert process.wait(60) == 0
    print(f"SIGINT in a rollout: saved and ended after {time.monotonic() - asked:.1f} s")
    assert 8 <= len(rows(run)) <= 9 and newest(run) == len(rows(run))
    finish(scratch, "stopped", "--resume", "auto")
    assert_equal_runs(run, reference)
    kept = (scratch / "stopped.log").read_text()
    assert "resumed from" in kept and "Traceback" not in kept


def test_what_cannot_go_on_is_refused(scratch, reference):
    """A setting that changes what is learned is named with both values, and the run stays as it was."""
    before = len((scratch / "reference.log").read_text())
    assert start(scratch, "reference", "--resume", "auto", "--seed", "3").wait(120) == 2
    assert "cannot go on with seed=3 (was 0)" in (scratch / "reference.log").read_text()[before:]
    assert len(rows(reference)) == STEPS


# Its ranks start without vLLM, and draw by what each knows of the other's responses.
ONE_EPISODE = ("--train.max_steps", "4", "--rollout.backend", "hf", "--replay.priority", "correctness")


@pytest.fixture(scope="module")
def two(scratch):
    """An episode on two ranks that nobody disturbs."""
    finish(scratch, "two", *ONE_EPISODE, ranks=2)
    return scratch / "two"


@pytest.fixture(scope="module")
def two_stopped(scratch):
    """The same, stopped within the episode: its folder and the steps it had done."""
    run = scratch / "two_stopped"
    process = start(scratch, "two_stopped", *ONE_EPISODE, ranks=2, torchrun=())
    wait_for(lambda: len(rows(run)) >= 1, process)
    os.killpg(process.pid, signal.SIGTERM)  # as schedulers and terminals do: to the launcher and the ranks at once
    process.wait(90)
    steps = len(rows(run))
    assert newest(run) == steps < 4, (scratch / "two_stopped.log").read_text()[-3000:]
    return run, steps


def test_another_number_of_ranks(scratch, two, two_stopped):
    """Two ranks stopped within an episode and resumed on one: the rest of the episode, which needs no new rollout, is
    the same to rounding (law 3), although the one rank takes over what the other had sampled."""
    run, steps = two_stopped
    shutil.copytree(run, scratch / "one_goes_on", symlinks=True)
    finish(scratch, "one_goes_on", "--resume", f"step_{steps:06d}", *ONE_EPISODE)
    for row, expected in zip(rows(scratch / "one_goes_on"), rows(two), strict=True):
        for name in ("loss", "grad_norm", "entropy", "reward_mean", "replay_size", "trained_pairs", "mismatch_kl"):
            assert row[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-7), (row["step"], name)


@pytest.mark.soak
def test_two_ranks_go_on_bit_for_bit(scratch, two, two_stopped):
    """Resumed on as many ranks as before, the metrics are those of the run that nobody disturbed."""
    finish(scratch, "two_stopped", "--resume", "auto", *ONE_EPISODE, ranks=2)
    assert rows(two_stopped[0]) == rows(two)


@pytest.mark.soak
def test_a_finished_run_can_be_made_longer(scratch, reference):
    """A finished run with more steps goes on where it ended, and validates at its new end."""
    shutil.copytree(reference, scratch / "longer", symlinks=True)
    more = ("--train.max_steps", str(STEPS + 1), "--train.max_generated_tokens", "4000")
    finish(scratch, "longer", "--resume", "auto", *more)
    longer = rows(scratch / "longer")
    assert longer[:STEPS] == rows(reference) and longer[STEPS]["step"] == STEPS + 1
    assert json.loads((scratch / "longer" / "validation.jsonl").read_text().splitlines()[-1])["step"] == STEPS + 1
