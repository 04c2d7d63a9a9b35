"""Memory that runs out in a step: one rank repeats it in smaller micro-batches, several end and leave a note."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rethinker.config import ConfigError
from rethinker.policy.out_of_memory import note_budget, noted_budget, smaller_budget
from rethinker.samples import Bundle, Completion, Query, Sample
from tests.policy.conftest import tiny_folder  # noqa: F401  (fixture)

from .memory_faults import BUDGET, PLACES

ROOT = Path(__file__).parents[2]


def launch(*arguments: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *torchrun, "-m", "tests.integration.memory_faults", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def results(tiny_folder, tmp_path_factory):  # noqa: F811
    scratch = tmp_path_factory.mktemp("memory")
    done = launch(str(tiny_folder), str(scratch), str(scratch / "results.pt"))
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(scratch / "results.pt", weights_only=False) | {"stderr": done.stderr}


def same(got: dict, clean: dict) -> bool:
    """Metrics and weights are equal bit for bit; only the count of retries may differ."""
    metrics = [{k: v for k, v in one["metrics"].items() if k != "oom_retries"} for one in (got, clean)]
    return metrics[0] == metrics[1] and all(torch.equal(got["weights"][n], t) for n, t in clean["weights"].items())


@pytest.mark.parametrize("place", [name for name in PLACES if name != "score"])
def test_a_repeated_step_equals_a_clean_one(results, place):
    """Wherever memory ran out: weights and metrics of the repeated step, and of the next one, are those of an engine
    that had the smaller budget from the start, bit for bit. Earlier micro-batches' gradients are gone."""
    result = results[place]
    assert result["raised"] and result["retries"] == 1
    assert result["budget"] < BUDGET
    for got, clean in zip(result["got"], result["clean"], strict=True):
        assert got["metrics"]["grad_norm"] > 0
        assert same(got, clean)
    print(f"{place}: fault to end of the repeated step {result['seconds']:.2f} s")


def test_nothing_of_the_failed_pass_is_kept(results):
    """Before the step is repeated every weight is partitioned again, no gradient is held and the activations are gone;
    before that, some were there."""
    left = {place: results[place]["left"] for place in PLACES}
    assert all(after == 0 for _, after in left.values())
    assert [place for place, (before, _) in left.items() if not before] in ([], ["pack"])


def test_repeated_scores_equal_clean_ones(results):
    """PolicyEngine.score starts again too, and the step after it is undisturbed."""
    result = results["score"]
    assert result["raised"] and result["retries"] == 1
    assert result["got"][0] == result["clean"][0] and all(result["got"][0])
    assert same(result["got"][1], result["clean"][1])


def test_retries_are_counted_and_the_budget_stays(results):
    """`oom_retries` counts since the run began, and the state to resume from has the count and the budget."""
    counts = [result["got"][-1]["metrics"]["oom_retries"] for result in map(results.get, PLACES) if result]
    assert counts[:3] == [1, 2, 3]
    state = results["state"]
    assert state["oom_retries"] == 9
    assert state["micro_batch_tokens"] == {"setting": BUDGET, "budget": results["score"]["budget"]}
    assert (
        f"train.micro_batch_tokens={BUDGET} is reduced to {state['micro_batch_tokens']['budget']}" in results["stderr"]
    )


def test_memory_that_no_budget_saves(results):
    """A single response that does not fit, and the optimizer's own memory: errors that name what would help."""
    assert results["hopeless"]["type"] == "ConfigError"
    for setting in ("policy.gradient_checkpointing", "rollout.gpu_memory_utilization", "rollout.max_new_tokens"):
        assert setting in results["hopeless"]["message"]
    assert results["optimizer"]["type"] == "OutOfMemory"
    assert "train.deepspeed" in results["optimizer"]["message"]


def test_several_ranks_end_and_leave_a_note(tiny_folder, tmp_path):  # noqa: F811
    """Rank 1 fails while rank 0 waits for it: both end and nothing hangs; the error names the setting and its new
    value, and the note holds it."""
    file = tmp_path / "micro_batch_tokens.json"
    done = launch(str(tiny_folder), str(tmp_path), str(file), ranks=2)
    stopped = time.time()
    assert done.returncode == 1
    budget = noted_budget(file, BUDGET)
    assert budget < BUDGET
    change = f"train.micro_batch_tokens={BUDGET} is reduced to {budget}"
    assert f"OutOfMemory: rank 1 ran out of memory in step 1, and ranks cannot repeat a step together: {change}" in (
        done.stderr
    )
    assert str(file) in done.stderr and "CUDA out of memory" in done.stderr  # the cause itself, too
    fault = float(re.search(r"fault at ([\d.]+)", done.stderr)[1])
    print(f"two ranks: fault to the end of both {stopped - fault:.1f} s")
    # Rank 0 ends by a lost connection or by torchrun's SIGTERM: it does not wait for its timeout of 60 s.
    assert stopped - fault < 30


def test_the_next_start_follows_the_note(results):
    """An engine with a noted budget starts with it."""
    assert results["noted"] == 81


def bundle_of(tokens: int) -> Bundle:
    sample = Sample(Query("q", "", ""), Completion([1] * tokens, [0.0] * tokens, "", "stop"), 1.0, 0, prompt_tokens=1)
    bundle = Bundle(sample.query, (sample,))
    assert bundle.tokens == tokens  # the last token is no input
    return bundle


def test_the_budget_halves_until_one_response_fills_it():
    """Half of what was used, not of a budget that nothing filled; never below the longest response."""

    def plan_for(budget):
        rows, row = [], []
        for tokens in (40, 30, 20, 10):
            if row and sum(row) + tokens > budget:
                rows, row = [*rows, row], []
            row.append(tokens)
        return [[[bundle_of(tokens) for tokens in row] for row in [*rows, row]]]

    assert smaller_budget(64, plan_for) == 40  # 32 would leave the response of 40 as it is
    assert smaller_budget(16384, plan_for) == 50
    with pytest.raises(ConfigError, match="one response of 40 tokens"):
        smaller_budget(40, plan_for)


def test_a_note_holds_for_the_setting_it_was_made_under(tmp_path):
    """Whoever changes train.micro_batch_tokens gets what they set."""
    file = tmp_path / "note.json"
    assert noted_budget(file, 16384) == 16384
    note_budget(file, 16384, 8192)
    assert noted_budget(file, 16384) == 8192
    assert noted_budget(file, 4096) == 4096
    assert [path.name for path in tmp_path.iterdir()] == ["note.json"]
