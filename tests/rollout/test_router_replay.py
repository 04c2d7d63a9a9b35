"""rollout.router_replay: the policy trains with the experts that vLLM took.

vLLM returns them from its model runner V2, which needs Triton; on a CPU these tests have Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rethinker.checks import check_geometry
from rethinker.config import Config, ConfigError, RolloutConfig
from rethinker.embedded.tiny import create_tiny
from rethinker.rollout.engine import make_engine
from tests.conftest import ROOT
from tests.families.test_training import REWARD
from tests.families.tiny_models import create
from tests.rollout.helpers import rollout_config

TOLERANCE = 1e-5  # nats, law 1


def run(*command: str) -> None:
    """A Python process of its own."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


# The other kinds of routers: each takes vLLM in Triton's interpreter half a minute.
OTHERS = [pytest.param(name, marks=pytest.mark.soak) for name in ("glm4v_moe", "gemma4-moe")]


@pytest.fixture(scope="module", params=["qwen3_vl_moe", *OTHERS])
def folder(request, tmp_path_factory):
    return create(request.param, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def seen(folder, tmp_path_factory):
    scratch = tmp_path_factory.mktemp("seen")
    run("-m", "tests.rollout.replayed_experts", str(folder), str(scratch))
    return json.loads((scratch / "seen.json").read_text())


def test_every_token_that_is_read_has_its_experts(seen, folder):
    """Of each of several samples, prompt tokens from the prefix cache included; a response's last token is not read."""
    layers = json.loads((folder / "config.json").read_text())["text_config"]["num_hidden_layers"]
    assert len(seen["shapes"]) >= 9 and all(shape == [-1, layers, 2, "uint8"] for shape in seen["shapes"])


@pytest.mark.parametrize("when", ["as loaded", "after a sync", "blurred"])
def test_logprobs_agree_with_the_experts_that_vllm_took(when, seen):
    """Law 1 holds where rounding chooses among experts that are alike, and not without what vLLM returned there; with
    other experts it holds nowhere."""
    assert seen[when]["replayed"] < TOLERANCE
    assert seen[when]["own"] < TOLERANCE if when != "blurred" else seen[when]["own"] > 1e-3
    assert seen[when]["planted"] > 1e-3


@pytest.mark.parametrize("backend", ["server", "hf", "recorded"])
def test_other_backends_are_refused(backend):
    """They do not say which experts they took."""
    known = {"servers": ["http://127.0.0.1:8100"]} if backend == "server" else {}
    known |= {"recording": "runs/x/completions"} if backend == "recorded" else {}
    with pytest.raises(ConfigError, match=f"rollout.router_replay=true needs rollout.backend=vllm: {backend} does not"):
        check_geometry(Config(rollout=RolloutConfig(backend=backend, router_replay=True, **known)))


def test_engines_over_several_gpus_are_refused():
    """vLLM's first rank alone would have the choices."""
    with pytest.raises(ConfigError, match="router_replay=true needs rollout.tensor_parallel_size=1, not 2"):
        check_geometry(Config(rollout=RolloutConfig(router_replay=True, tensor_parallel_size=2)))


def test_a_model_without_experts_is_refused(tmp_path):
    """In one line."""
    model = create_tiny(tmp_path)
    with pytest.raises(ConfigError, match="a qwen2_5_vl model has no experts to choose from; set it to false$"):
        make_engine(rollout_config(router_replay=True), str(model), rank=0, world_size=1, local_rank=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing to refuse: with Triton vLLM returns them")
def test_a_vllm_that_returns_none_is_refused(folder, monkeypatch):
    """On a CPU without Triton, in one line."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")  # as the engine sets it: no other test is to have it
    with pytest.raises(ConfigError, match="needs vLLM's model runner V2, which does not run here .*; set it to false$"):
        make_engine(rollout_config(router_replay=True), str(folder), rank=0, world_size=1, local_rank=0)


SETTINGS = """easy_vqa_cpu --rollout.group_size 4 --train.batch_pairs 8 --train.episode_queries 4
--rollout.router_replay true --rollout.max_new_tokens 12 --rollout.kv_cache_gb 0.1
--train.learning_rate 1e-3 --train.schedule constant --train.warmup_ratio 0 --validation.size 4""".split()


@pytest.mark.soak
def test_a_run_replays_them_and_resumes_bit_for_bit(folder, tmp_path):
    """Laws 1 and 10, with replay of samples: ended after an episode and resumed, a run ends with the weights and
    numbers of one that was not."""
    (tmp_path / "reward.py").write_text(REWARD)

    def train(name: str, steps: int, *options: str) -> list[dict]:
        paths = ["--run.dir", str(tmp_path), "--run.name", name, "--policy.model", str(folder)]
        paths += ["--reward.function", f"{tmp_path / 'reward.py'}:parity", "--train.max_steps", str(steps)]
        run("-m", "tests.rollout.interpreted", "train", *SETTINGS, *paths, *options)
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    whole = train("whole", 4)
    assert len(whole) == 4 and all(0 <= row["mismatch_kl"] < 1e-10 and row["expert_load_max"] >= 1 for row in whole)
    assert whole[2]["replay_fraction"] > 0 and whole[3]["replay_fraction"] > 0  # sampled before the run was ended
    train("parts", 2)
    parts = train("parts", 4, "--resume", "auto")
    timed = {name for name in whole[0] if name.endswith("_s")} | {"peak_memory_gb", "val_accuracy"}  # its end has one
    assert [{n: v for n, v in row.items() if n not in timed} for row in parts] == [
        {n: v for n, v in row.items() if n not in timed} for row in whole
    ]
    ends = [load_file(Path(tmp_path, name, "checkpoints", "last", "model.safetensors")) for name in ("whole", "parts")]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
