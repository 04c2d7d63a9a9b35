"""The presets `offload` and `zeropp`: what DeepSpeed is told and then holds, and that the numbers stay the same."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from rethinker.config import Config, ConfigError
from rethinker.policy.zero3 import deepspeed_config, without_optimizer
from rethinker.settings import resolve_config
from tests.conftest import ROOT
from tests.policy.conftest import tiny_folder  # noqa: F401  (a fixture)


def zero_of(recipe: str) -> DeepSpeedZeroConfig:
    return DeepSpeedZeroConfig(**deepspeed_config(resolve_config(recipe), 16, on_gpu=False)["zero_optimization"])


def test_what_deepspeed_is_told():
    """Each preset adds its own entry to the project's ZeRO-3 settings, in any order; nothing lossy is switched on."""
    plain = zero_of("qwen2_5_vl_7b")
    assert plain.offload_optimizer is None and plain.zero_hpz_partition_size == 1
    for recipe in ("qwen2_5_vl_7b+offload+zeropp", "qwen2_5_vl_7b+zeropp+offload"):
        zero = zero_of(recipe)
        assert zero.stage == 3 and zero.reduce_bucket_size == plain.reduce_bucket_size
        assert zero.offload_optimizer.device == "cpu" and zero.offload_optimizer.pin_memory
        assert zero.zero_hpz_partition_size == 8
        assert not (zero.zero_quantized_weights or zero.zero_quantized_gradients)


def test_a_partition_that_does_not_divide_the_ranks():
    """The setting and what would work are named; fewer ranks than its GPUs are one node."""
    config = Config()
    config.train.deepspeed = {"zero_optimization": {"zero_hpz_partition_size": 8}}
    with pytest.raises(ConfigError, match=r"zero_hpz_partition_size=8 must divide the number of ranks \(12\)"):
        deepspeed_config(config, 12, on_gpu=False)
    for ranks in (1, 2, 8, 64):
        settings = deepspeed_config(config, ranks, on_gpu=False)
        assert without_optimizer(settings)["zero_optimization"]["zero_hpz_partition_size"] == 1


@pytest.mark.soak
@pytest.mark.parametrize("ranks", [2, 4])
def test_steps_are_those_without(ranks, tiny_folder, tmp_path):  # noqa: F811
    """Two steps with a reference policy, on gloo ranks: metrics and weights as without the preset. The optimizer is
    where the preset puts it, and a rank holds the planned part of the second copy: on four ranks as two nodes."""
    presets = {"plain": {}}
    presets |= {name: resolve_config(f"qwen2_5_vl_7b+{name}").train.deepspeed for name in ("offload", "zeropp")}
    presets["zeropp"]["zero_optimization"]["zero_hpz_partition_size"] = 2
    output = tmp_path / "steps.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "tests.integration.scaled_steps", str(tiny_folder), str(tmp_path), str(output)]
    done = subprocess.run([*command, json.dumps(presets)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    results = torch.load(output, weights_only=False)
    plain = results["plain"]
    for name in ("offload", "zeropp"):
        for mine, other in zip(results[name]["metrics"], plain["metrics"], strict=True):
            assert mine == pytest.approx(other, rel=1e-5, abs=1e-7)
        for weight, tensor in plain["weights"].items():  # AdamW moves each by 1e-4 a step, tiny gradients by noise
            torch.testing.assert_close(results[name]["weights"][weight], tensor, rtol=1e-5, atol=2e-6)
        assert results[name]["offload"] == (name == "offload")
    assert plain["secondary"] == results["offload"]["secondary"] == 0
    assert results["zeropp"]["secondary"] == pytest.approx(plain["parameters"] / 2, rel=0.01)
