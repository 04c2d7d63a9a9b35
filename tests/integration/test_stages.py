"""The embedded default in its two stages, small: the second goes on from the first, and its report tells of both."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from statistics import mean

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from tests import forked
from tests.forked import ROOT

SMALL = """--policy.warmup.look_steps 2 --policy.warmup.steps 2 --policy.warmup.batch_size 4
    --policy.warmup.data_fraction 0.01
    --train.max_steps 2 --train.batch_pairs 64 --train.episode_queries 8 --rollout.kv_cache_gb 0.1
    --validation.every 1 --validation.size 16""".split()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Both stages, as `make train` starts them."""
    folder = tmp_path_factory.mktemp("stages")
    # So small a warm-up answers nothing right; this differs within a group, so that both stages learn.
    (folder / "reward.py").write_text("def parity(response, answer, query):\n    return len(response) % 2\n")
    first, second = folder / "stage1", folder / "stage2"
    for recipe, run, more in (
        ("sums_cpu", first, []),
        ("sums_cpu_stage2", second, ["--policy.model", str(first / "checkpoints" / "best"), "--rethink.fraction", "1"]),
    ):
        options = ["--run.dir", str(folder), "--run.name", run.name, *SMALL, *more]
        options += ["--reward.function", f"{folder / 'reward.py'}:parity"]
        forked.run(forked.training([recipe, *options]), folder / f"{run.name}.log", ranks=2)
    return [first, second]


def greedy(run: Path, step: int) -> dict[str, list[int]]:
    rows = pq.read_table(run / "validation" / f"step_{step:06d}.parquet", columns=["query_id", "token_ids"]).to_pylist()
    return {row["query_id"]: row["token_ids"] for row in rows}


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_second_stage_begins_with_the_best_model_of_the_first(runs):
    """Its answers before training are that checkpoint's, token for token, and not those of the model before it."""
    best = (runs[0] / "checkpoints" / "best").resolve().name
    before = greedy(runs[1], 0)
    chosen = greedy(runs[0], int(best[-6:]))
    assert len(before) == 16 and before == chosen != greedy(runs[0], 0)
    first, second = (load_file(run / "checkpoints" / "best" / "model.safetensors") for run in runs)
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_the_second_stage_asks_other_questions(runs):
    """Its seed is another one: else it would train on the first stage's questions again, in their order."""
    first, second = (pq.read_table(run / "completions", columns=["query_id"])["query_id"].to_pylist() for run in runs)
    assert len(first) == len(second) and len(set(first) & set(second)) < len(set(first)) // 2


def test_only_the_second_stage_forces(runs):
    """Second passes are sampled and counted, in the second stage alone."""
    rows = [rows_of(run / "metrics.jsonl") for run in runs]
    forced = [sum(row["rethink_forced"] for row in of) for of in rows]
    assert forced[0] == 0 < forced[1]
    assert all(set(row["queries_by_category"]) == {f"{n} terms" for n in range(2, 7)} for of in rows for row in of)


def test_one_report_tells_of_both(runs):
    """The second run's page is of two stages."""
    page = (runs[1] / "report.html").read_text()
    assert "stage 2 of 2" in page and 'id="figure-kinds"' in page


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_the_default_learns_to_think(tmp_path):
    """What `make train` is for, in a quarter of its steps: answers at once die out, and greedy accuracy rises."""
    options = ["--run.dir", str(tmp_path), "--run.name", "run", "--train.max_steps", "40", "--validation.size", "256"]
    forked.run(forked.training(["sums_cpu", *options]), tmp_path / "log", ranks=2)
    fast = [row["fast_ratio"] for row in rows_of(tmp_path / "run" / "metrics.jsonl")]
    accuracies = [row["val_accuracy"] for row in rows_of(tmp_path / "run" / "validation.jsonl")]
    assert mean(fast[:8]) > 0.4 and mean(fast[-8:]) < 0.15
    assert accuracies[-1] > accuracies[0] + 0.2


def test_make_train_launches_both_stages_after_a_check():
    """Both recipes are checked, then each runs on two ranks, the second one from the first one's best checkpoint."""
    options = ["EXTRA=cpu", "RUN=runs/x", "ARGS=--train.max_steps 2"]
    shown = subprocess.run(
        ["make", "-n", "train", *options], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    commands = shown.replace("\\\n", "").splitlines()  # installation first, where it is still to be done
    check, first, second = (line for line in commands if "rethinker train" in line)
    assert "sums_cpu sums_cpu_stage2" in check and "--train.max_steps 2 --print_config" in check
    for number, line in enumerate((first, second), start=1):
        assert "--nproc-per-node 2 -m rethinker train sums_cpu" in line and f"--run.name x-stage{number}" in line
    assert "sums_cpu_stage2 --train.max_steps 2" in second and "--policy.model runs/x-stage1/checkpoints/best" in second
