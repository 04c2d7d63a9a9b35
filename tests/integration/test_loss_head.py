"""The LM head whose forward is the fused loss, under ZeRO-3 on two ranks, tied to the embedding and not."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests import forked
from tests.integration import head_steps
from tests.integration.test_zero3 import relative_error
from tests.policy.conftest import tiny_folder, untied_folder  # noqa: F401  (fixtures)


@pytest.fixture(scope="module")
def both(tiny_folder, untied_folder, tmp_path_factory):  # noqa: F811
    """What head_steps.py saw of the tied head and of the other."""
    scratch = tmp_path_factory.mktemp("head")
    arguments = [str(scratch), str(scratch / "out.pt"), str(tiny_folder), str(untied_folder)]
    forked.run(partial(head_steps.main, *arguments), scratch / "log", ranks=2)
    return torch.load(scratch / "out.pt", weights_only=False)


@pytest.fixture(params=["tied", "untied"])
def steps(request, both):
    return both[request.param == "untied"]


@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_gradients_equal_the_unfused_path(steps, importance):
    """Loss, statistics and every gradient are those of log-probs and grpo_loss under autograd, to 1e-5 relative."""
    fused, plain = steps[importance, "forward"], steps[importance, "unfused"]
    assert fused["metrics"].keys() == plain["metrics"].keys()
    for name, value in plain["metrics"].items():  # null: a dense model has no experts to count
        assert fused["metrics"][name] == (None if value is None else pytest.approx(value, rel=1e-5, abs=1e-7)), name
    assert fused["metrics"]["loss"] != 0 and fused["metrics"]["entropy"] > 0
    assert relative_error(fused["gradients"], plain["gradients"]) <= 1e-5


def test_the_head_is_gathered_once_per_micro_batch(steps):
    """The three products share one gather, also with the embedding where they are tied."""
    assert steps["micro_batches"] > 1
    assert steps["gathers"] == steps["micro_batches"]


def test_a_loss_of_the_users_own_trains(steps):
    """CISPO in a file: a step with a gradient; its metrics count where GRPO's clips would act."""
    metrics = steps["cispo"]
    assert metrics["loss"] != 0 and metrics["grad_norm"] > 0 and metrics["skipped"] == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("breaks", "it is nan in step 7"),
        ("shrinks", "in step 8, LossError: loss: must return a number per token, "),
        ("raises", "in step 8, LossError: loss: it raises ZeroDivisionError: "),
    ],
)
def test_a_loss_that_breaks_in_training_ends_it(steps, name, message):
    """NaN from finite log-probs is no step to skip, and what the file raises no traceback: on every rank one line names
    the setting."""
    assert steps[name].startswith("algorithm.loss=") and f"{name}: {message}" in steps[name]
    assert "\n" not in steps[name]
