"""algorithm.reference_every under ZeRO-3 on one and two gloo ranks, and what an entropy bonus does to a policy."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from tests import forked
from tests.integration import reference_steps
from tests.integration.reference_steps import KINDS, SAVED
from tests.policy.conftest import tiny_folder  # noqa: F401  (fixture)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("reference")


@pytest.fixture(scope="module")
def runs(scratch, tiny_folder):  # noqa: F811
    """What reference_steps saved, by the number of ranks; one rank goes on from the checkpoints of two, too."""
    results = {}
    for ranks in (2, 1):
        output = scratch / f"{ranks}.pt"
        steps = partial(reference_steps.main, str(tiny_folder), str(scratch), str(output))
        forked.run(steps, scratch / f"{ranks}.log", ranks)
        results[ranks] = torch.load(output, weights_only=False)
    return results


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_kl_is_from_the_policy_that_was_the_last_moves(kind, ranks, runs):
    """The KL is 0, to rounding, in the first step and in the one after a move, and grows from there: the reference is
    the policy as it was, and stays that while the policy trains on. With adapters no second model is loaded."""
    found = runs[ranks][kind]
    after = [metrics["kl"] for metrics in found["after"]]
    for kls in (found["before"], after):
        assert abs(kls[0]) < 1e-9 and kls[1] > 1e-5 and kls[2] > kls[1]
    assert all(not torch.equal(tensor, found["first"][name]) for name, tensor in found["moved"].items())
    assert equal(found["still"], found["moved"])
    assert found["own"] == (kind == "lora")


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_move_as_one(kind, runs):
    """Law 3: the same KL and loss on either side of a move, whoever holds which piece."""
    one, two = (runs[ranks][kind] for ranks in (1, 2))
    assert two["before"] == pytest.approx(one["before"], rel=1e-3, abs=1e-9)
    for a, b in zip(one["after"], two["after"], strict=True):
        assert (b["kl"], b["loss"]) == (pytest.approx(a["kl"], rel=1e-3, abs=1e-9), pytest.approx(a["loss"], rel=1e-4))


@pytest.mark.parametrize("kind", SAVED)
def test_resumed_bit_for_bit(kind, runs):
    """Law 10: from a checkpoint that two ranks wrote right after a move their steps are the undisturbed ones."""
    found = runs[2][kind]
    assert equal(found["loaded"], found["moved"])
    assert found["resumed"] == found["after"]


@pytest.mark.parametrize("kind", SAVED)
def test_another_number_of_ranks_goes_on_with_the_same_reference(kind, runs, scratch):
    """One rank takes two ranks' pieces up, bit for bit, and its steps are theirs to rounding."""
    files = sorted((scratch / kind / "trainer").glob("reference_*"))
    pieces, found = [load_file(file) for file in files], runs[1][kind]
    assert len(pieces) == 2 and pieces[0].keys() == found["loaded"].keys()
    for name, tensor in found["loaded"].items():  # the last rank's piece is padded
        assert torch.equal(torch.cat([piece[name] for piece in pieces])[: tensor.numel()], tensor), name
    for got, expected in zip(found["resumed"], runs[2][kind]["after"], strict=True):
        assert got["kl"] == pytest.approx(expected["kl"], rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("kind", SAVED)
def test_the_reference_counts_in_the_size_of_a_checkpoint(kind, runs, scratch):
    """To a hundredth; of adapters the headers are more."""
    written = sum(path.stat().st_size for path in (scratch / kind).rglob("*.safetensors"))
    assert runs[2][kind]["expected bytes"] == pytest.approx(written, rel=0.1 if kind == "lora" else 0.01)


def test_an_entropy_bonus_keeps_the_entropy_up(runs):
    """Five steps on the same responses: both start alike; with a bonus the policy's entropy is higher at the end."""
    without, bonus = runs[1]["entropies"].values()
    assert bonus[0] == without[0] and bonus[-1] > without[-1] + 0.05, (without, bonus)
