"""A training step's memory at a real vocabulary: bounded, where plain PyTorch's is several copies of the logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.policy.conftest import tiny_folder  # noqa: F401  (fixture)

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc (Linux)")
def test_peak_memory_of_a_training_step(tiny_folder, tmp_path):  # noqa: F811
    """V = 151,936, R = 4,096 (logits of 2.5 GB): under 2 GB above the weights where the naive path takes over 5; the
    same loss and gradients to 1e-5."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])
    peaks, results = {}, {}
    for way in ("naive", "fused"):
        command = [sys.executable, "-m", "tests.kernels.peak_memory", way, str(tiny_folder), str(tmp_path / way)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        said = json.loads(done.stdout.splitlines()[-1])
        assert said["rows"] == 4096
        peaks[way], results[way] = said["gigabytes"], torch.load(tmp_path / way)
    assert peaks["naive"] > 5 and peaks["fused"] < 2, peaks
    (loss, gradients), (expected_loss, expected) = results["fused"], results["naive"]
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm().clamp(min=1e-8), name
