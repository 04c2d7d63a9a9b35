"""Memory that runs out: an error that names what to set, and a smaller budget for the next start."""

from __future__ import annotations

import json
import re
import time
from functools import partial

import pytest

from rethinker.config import ConfigError
from rethinker.policy.out_of_memory import noted_budget, reduce_budget, smaller_budget
from rethinker.samples import Bundle, Completion, Query, Sample
from tests import forked
from tests.policy.conftest import tiny_folder  # noqa: F401  (fixture)

from . import memory_faults
from .memory_faults import BUDGET, FULL


@pytest.fixture(scope="module")
def run(tiny_folder, tmp_path_factory):  # noqa: F811
    """What memory_faults.py saw on two ranks, and how it ended."""
    scratch = tmp_path_factory.mktemp("memory")
    log = scratch / "ranks.log"
    ranks = forked.Forked(partial(memory_faults.main, str(tiny_folder), str(scratch)), log, ranks=2)
    code = ranks.wait(200)
    stopped = time.time()
    assert (scratch / "results.json").is_file(), log.read_text()[-3000:]
    results = json.loads((scratch / "results.json").read_text())
    return code, log.read_text(), stopped, scratch / "micro_batch_tokens.json", results


@pytest.mark.parametrize("work", ["train_step", "score", "with a note"])
def test_the_error_names_the_smaller_budget(run, work):
    """In a step and in scoring: the setting, its value and the one to set or, in a run's folder, where it is noted."""
    *_, note, results = run
    failure = results[work]
    assert failure["type"] == "OutOfMemory" and failure["cause"] == FULL
    change = rf"rank 0 ran out of memory in step 1: train\.micro_batch_tokens={BUDGET} is reduced to (\d+); "
    found = re.match(change, failure["message"])
    assert found and int(found[1]) < BUDGET
    expected = f"{note} says so" if work == "with a note" else f"set train.micro_batch_tokens={found[1]}"
    assert expected in failure["message"]


def test_the_next_start_follows_the_note(run):
    """An engine with a noted budget starts with it and trains."""
    *_, results = run
    noted_before, budget, grad_norm = results["noted"]
    assert not noted_before and f"is reduced to {budget};" in results["with a note"]["message"] and grad_norm > 0


def test_memory_that_no_budget_saves(run):
    """A single response that does not fit, and the optimizer's own memory: errors that name what would help."""
    *_, results = run
    assert results["one response"]["type"] == "ConfigError"
    for setting in ("policy.gradient_checkpointing", "rollout.gpu_memory_utilization", "rollout.max_new_tokens"):
        assert setting in results["one response"]["message"]
    assert results["optimizer"]["type"] == "OutOfMemory"
    assert "train.deepspeed" in results["optimizer"]["message"]


def test_several_ranks_end_and_leave_a_note(run):
    """Rank 1 fails while rank 0 waits for it: both end and nothing hangs; the error names the setting and its new
    value, and the note holds it."""
    code, log, stopped, note, _ = run
    assert code == 1
    note = note.with_name("last.json")
    budget = noted_budget(note, BUDGET)
    assert budget < BUDGET
    change = f"train.micro_batch_tokens={BUDGET} is reduced to {budget}; {note} says so"
    assert f"OutOfMemory: rank 1 ran out of memory in step 1: {change}" in log
    assert FULL in log  # the cause itself, too
    fault = float(re.findall(r"fault at ([\d.]+)", log)[-1])
    print(f"two ranks: fault to the end of both {stopped - fault:.1f} s")
    # Rank 0 ends by a lost connection: it does not wait for its timeout of 60 s.
    assert stopped - fault < 30


def bundle_of(tokens: int) -> Bundle:
    sample = Sample(Query("q", "", ""), Completion([1] * tokens, [0.0] * tokens, "", "stop"), 1.0, 0, prompt_tokens=1)
    bundle = Bundle(sample.query, (sample,))
    assert bundle.tokens == tokens  # the last token is no input
    return bundle


def plan(*rows: list[int]) -> list:
    """One rank's micro-batches, from the tokens of their bundles."""
    return [[[bundle_of(tokens) for tokens in row] for row in rows]]


def test_the_budget_halves_until_one_response_fills_it():
    """Half of what was used, not of a budget that nothing filled; never below the longest response."""
    assert smaller_budget(64, plan([40], [30, 20, 10])) == 40  # 32 would leave the response of 40 as it is
    assert smaller_budget(16384, plan([40, 30, 20, 10])) == 50
    with pytest.raises(ConfigError, match="one response of 40 tokens"):
        smaller_budget(40, plan([40], [30, 10], [20]))


def test_a_note_holds_for_the_setting_it_was_made_under(tmp_path):
    """Whoever changes train.micro_batch_tokens gets what they set."""
    file = tmp_path / "note.json"
    assert noted_budget(file, 16384) == noted_budget(None, 16384) == 16384
    reduce_budget(file, 16384, 16384, plan([40, 30, 20, 10]))
    assert noted_budget(file, 16384) == 50
    assert noted_budget(file, 4096) == 4096
    assert [path.name for path in tmp_path.iterdir()] == ["note.json"]
