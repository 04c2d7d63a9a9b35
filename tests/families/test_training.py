"""The whole loop in every family: real vLLM, real ZeRO-3, easy-VQA, as a user starts it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from rethinker.config import PolicyConfig
from rethinker.policy.loading import load_model
from rethinker.policy.model import Policy
from tests.conftest import ROOT

# A random model never answers right; this reward makes its groups differ.
REWARD = "def parity(response, answer, query):\n    return float(len(response) % 2)\n"

SETTINGS = """easy_vqa_cpu --rollout.group_size 4 --train.batch_pairs 32 --train.episode_queries 16 --train.max_steps 4
--rollout.max_new_tokens 24 --rollout.kv_cache_gb 0.1 --rollout.check_sync true --train.learning_rate 1e-3
--validation.size 16 --validation.every 1""".split()


@pytest.mark.soak
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_trains_and_its_checkpoint_starts_the_next(folder, ranks, tmp_path, cell):
    """Two episodes, with law 1 after every sync (mismatch_kl at rounding, every tensor compared), every weight moved
    that is trained, every other and every buffer as it was, and a checkpoint from which a further run starts."""
    (tmp_path / "reward.py").write_text(REWARD)

    def train(name: str, model, *options: str) -> list[dict]:
        paths = ["--run.dir", str(tmp_path), "--run.name", name, "--policy.model", str(model)]
        paths += ["--reward.function", f"{tmp_path / 'reward.py'}:parity"]
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        command = [sys.executable, *launch, "-m", "rethinker", "train", *SETTINGS, *paths, *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    rows = train("one", folder)
    assert len(rows) == 4 and all(row["skipped"] == 0 and row["grad_norm"] > 0 for row in rows)
    assert all(0 <= row["mismatch_kl"] < 1e-10 for row in rows)
    last = tmp_path / "one" / "checkpoints" / "last"
    models = [load_model(path, torch.float32) for path in (folder, last)]
    before, after = (model.state_dict() for model in models)
    assert before.keys() == after.keys()
    policy = Policy(models[0], PolicyConfig(dtype="float32")).hf
    fixed = {name for name, parameter in policy.named_parameters() if not parameter.requires_grad}
    fixed |= before.keys() & dict(policy.named_buffers()).keys()
    assert {name for name, tensor in before.items() if torch.equal(tensor, after[name])} == fixed
    for name, options in (("two", ("--policy.freeze_vision", "true")), ("three", ("--policy.lora.rank", "4"))):
        again = train(name, last, "--train.max_steps", "2", *options)
        assert all(0 <= row["mismatch_kl"] < 1e-10 for row in again)
    cell("runs with vLLM", f"{ranks} rank{'s' * (ranks > 1)}")
