"""Dry runs of the shipped recipes: their settings, a tiny random model of their family, rows in ViRL39K's schema."""

from __future__ import annotations

import json

import pytest

from rethinker.embedded.tiny import create_tiny
from tests import forked
from tests.data.virl39k import write_fixture
from tests.families import tiny_models
from tests.test_recipes import SCALES

# A random model never answers right; this reward makes its groups differ.
REWARD = "def parity(response, answer, query):\n    return float(len(response) % 2)\n"

# What a CPU and a tiny model need; everything else is the recipe's.
SMALL = """--train.max_steps 2 --train.batch_pairs 64 --train.episode_queries 16 --rollout.max_new_tokens 24
--rollout.kv_cache_gb 0.1 --rollout.tensor_parallel_size 1 --data.min_pixels 1024 --data.max_pixels 4096
--data.validation_share 0.1 --validation.size 8 --train.learning_rate 1e-3""".split()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "reward.py").write_text(REWARD)
    write_fixture(folder, archive=True)
    create_tiny(folder / "qwen2_5_vl", seed=0)
    tiny_models.create("qwen3_vl", folder / "qwen3_vl")
    return folder


@pytest.mark.soak
@pytest.mark.parametrize("stage", ["", "+stage2", "+released_code", "+released_code+stage2"])
@pytest.mark.parametrize("name", SCALES)
def test_dry_run(scratch, name, stage):
    """Two steps in bf16 with gradient checkpointing, as the recipe says; rollout and trainer agree to bf16."""
    family = "qwen3_vl" if name.startswith("qwen3") else "qwen2_5_vl"
    run = (name + stage).replace("+", "-")
    options = ["--run.dir", str(scratch), "--run.name", run, "--policy.model", str(scratch / family)]
    options += ["--data.train", str(scratch / "39Krelease.parquet"), "--data.image_root", str(scratch / "images.zip")]
    options += ["--reward.function", f"{scratch / 'reward.py'}:parity", *SMALL]
    forked.run(forked.training([name + stage, *options]), scratch / f"{run}.log")
    rows = [json.loads(line) for line in (scratch / run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and all(row["skipped"] == 0 for row in rows)
    assert rows[0]["grad_norm"] > 0 and 0 <= rows[0]["mismatch_kl"] < 1e-2
    assert (rows[0]["rethink_forced"] > 0) == ("stage2" in stage)
