"""ZeRO-3 has every weight where it is used, in every family, however little of the model it holds at a time."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from rethinker.policy.loading import load_model
from tests import forked
from tests.families import ranks_step
from tests.families.tiny_models import FAMILIES, create


@pytest.mark.parametrize("folder", FAMILIES)
def test_a_step_of_two_ranks_is_that_of_one(folder, tmp_path, cell):
    """Law 3 where every layer is gathered a matrix at a time: loss and gradients to 1e-5 relative."""
    model, found = create(folder, tmp_path / "model"), {}
    for ranks in (1, 2):
        output = tmp_path / f"{ranks}.pt"
        arguments = [str(model), str(tmp_path), str(output)]
        forked.run(partial(ranks_step.main, *arguments), tmp_path / f"{ranks}.log", ranks)
        found[ranks] = torch.load(output, weights_only=False)
    one, two = found[1], found[2]
    # Or a layer's weights would come together; DeepSpeed itself gathers the experts that it knows so.
    assert not (one["whole"] | two["whole"]) - {"Qwen3MoeSparseMoeBlock"}
    for key in ("loss", "grad_norm", "entropy"):
        assert two["metrics"][key] == pytest.approx(one["metrics"][key], rel=1e-5), key
    check_buffers(model, two["buffers"])
    least = 1e-3 * one["metrics"]["grad_norm"]  # a key's bias has none where every query sees all keys: rounding alone
    for name, gradient in one["gradients"].items():
        error = (two["gradients"][name] - gradient).norm() / gradient.norm().clamp(min=least)
        assert error <= 1e-5, name
        cell("2 ranks", float(error))


def check_buffers(model, found):
    """What is no weight has the type and the numbers that it has in a model that transformers loads in bf16: RoPE's
    frequencies fp32. DeepSpeed would make them bf16, which turns late tokens by radians too much."""
    expected = dict(load_model(model, torch.bfloat16).named_buffers())
    assert found.keys() == expected.keys()
    for name, buffer in expected.items():
        assert found[name].dtype == buffer.dtype and torch.equal(found[name], buffer), name
    assert any(name.endswith("inv_freq") and buffer.dtype == torch.float32 for name, buffer in found.items())
