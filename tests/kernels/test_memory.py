"""A training step's memory at a real vocabulary: bounded, where plain PyTorch's is several copies of the logits."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from tests import forked
from tests.kernels import peak_memory
from tests.policy.conftest import tiny_folder  # noqa: F401  (fixture)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc (Linux)")
@pytest.mark.parametrize("responses", [16, pytest.param(64, marks=pytest.mark.soak)])
def test_peak_memory_of_a_training_step(responses, tiny_folder, tmp_path):  # noqa: F811
    """V = 151,936, R = 1,024 (logits of 0.62 GB; soak: 4,096, 2.5 GB): under 0.8 times the logits above the weights,
    where the naive path takes over 2 times; the same loss and gradients to 1e-5."""
    copies, results = {}, {}
    for way in ("naive", "fused"):
        step = partial(peak_memory.main, way, responses, str(tiny_folder), str(tmp_path / way))
        forked.run(step, tmp_path / f"{way}.log")
        size, *results[way] = torch.load(tmp_path / way)
        copies[way] = size / (4 * responses * peak_memory.LENGTH * peak_memory.VOCABULARY)
    assert copies["naive"] > 2 and copies["fused"] < 0.8, copies
    (loss, gradients), (expected_loss, expected) = results["fused"], results["naive"]
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm().clamp(min=1e-8), name
