"""Mixtures of experts under ZeRO-3, on one and two gloo ranks: experts are gathered whole, and law 3 holds."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from rethinker.policy.loading import load_model
from tests import forked
from tests.families.tiny_models import create
from tests.integration import expert_steps
from tests.integration.expert_steps import BUCKETS
from tests.integration.test_zero3 import relative_error

LOAD = ("expert_load_max", "expert_load_mean", "experts_unused")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return create("qwen3_vl_moe", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory):
    """By the number of ranks."""
    scratch = tmp_path_factory.mktemp("experts")
    found = {}
    for ranks, budgets in ((1, ("10000", "60")), (2, ("10000",))):
        arguments = [str(model), str(scratch), str(scratch / f"{ranks}.pt"), *budgets]
        forked.run(partial(expert_steps.main, *arguments), scratch / f"{ranks}.log", ranks)
        found[ranks] = torch.load(scratch / f"{ranks}.pt", weights_only=False)
    return found


@pytest.mark.parametrize("gathered", BUCKETS)
@pytest.mark.parametrize("name", ["mixed", "one sample"])
@pytest.mark.parametrize("ranks, budget", [(1, 60), (2, 10_000)], ids=["small micro-batches", "two ranks"])
def test_a_step_depends_on_neither_ranks_nor_micro_batches(ranks, budget, name, gathered, runs):
    """Law 3, whatever ZeRO-3's hooks stand around; where no prompt is repeated for another micro-batch, the experts'
    load is the same, too."""
    expected, got = runs[1]["whole layers", 10_000, name], runs[ranks][gathered, budget, name]
    for key in ("loss", "grad_norm", "entropy", *(LOAD if ranks == 2 else ())):
        assert got["metrics"][key] == pytest.approx(expected["metrics"][key], rel=1e-5, abs=1e-7), key
    assert relative_error(got["gradients"], expected["gradients"]) <= 1e-5


@pytest.mark.parametrize("gathered", BUCKETS)
@pytest.mark.parametrize("name", ["mixed", "one sample"])
def test_experts_are_gathered_whole(name, gathered, runs, model):
    """Two ranks partition every parameter; while a layer's experts are at work, each has all of them."""
    layers = [layer.mlp for layer in load_model(model, torch.float32).model.language_model.layers]
    whole = [[p.numel() for p in mlp.experts.parameters()] for mlp in layers if hasattr(mlp, "experts")]
    parted, parameters = runs[2]["partitioned"]
    assert parted == parameters
    assert runs[2][gathered, 10_000, name]["weights at work"] == whole
