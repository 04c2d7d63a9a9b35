"""Adapters under ZeRO-3 on one and two gloo ranks: what moves, what does not, and how a resumed run goes on."""

from __future__ import annotations

import functools

import pytest
import torch

from rethinker.policy.loading import load_model
from tests import forked
from tests.integration import lora_steps
from tests.integration.interruptions import assert_equal_runs, disturb, finish, prepare, rows
from tests.policy.conftest import tiny_folder  # noqa: F401  (fixture)

TWO = pytest.param(2, marks=pytest.mark.soak)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("lora")


@pytest.fixture(scope="module")
def runs(scratch, tiny_folder):  # noqa: F811
    """What lora_steps saved, by the number of ranks; a run is made when it is first asked for."""

    @functools.cache
    def run(ranks: int) -> dict:
        output = scratch / f"{ranks}.pt"
        arguments = [str(tiny_folder), str(scratch), str(output)]
        forked.run(functools.partial(lora_steps.main, *arguments), scratch / f"{ranks}.log", ranks)
        return torch.load(output, weights_only=False)

    return run


def part(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("ranks", [1, TWO])
def test_only_adapters_move(ranks, runs, tiny_folder):  # noqa: F811
    """Before the first step the merged weights are the model's, bit for bit. After steps every A and B has moved, the
    merged weights of exactly the decoder's linear layers have, and no base weight has by a bit."""
    run = runs(ranks)
    model = dict(load_model(tiny_folder, torch.float32).named_parameters())
    end = run["rest"][1]
    assert equal(part(run["start"], "base."), model) and equal(part(run["start"], "merged."), model)
    assert equal(part(end, "base."), model)
    before, after = part(run["start"], "base_model."), part(end, "base_model.")
    assert len(after) == 2 * 7 * 4 and all(not torch.equal(after[name], before[name]) for name in after)
    moved = {name for name, tensor in part(end, "merged.").items() if not torch.equal(tensor, model[name])}
    assert moved == {name for name in model if ".language_model.layers." in name and name.endswith("_proj.weight")}
    assert all(metrics["grad_norm"] > 0 and not metrics["skipped"] for metrics in run["first"])


@pytest.mark.soak
def test_two_ranks_step_as_one(runs):
    """Law 3, with every parameter partitioned, A and B among them: metrics within 1e-5, and adapters start alike."""
    assert runs(2)["partitioned"] and not runs(1)["partitioned"]
    assert equal(part(runs(1)["start"], "base_model."), part(runs(2)["start"], "base_model."))
    for one, two in zip(runs(1)["first"] + runs(1)["rest"][0], runs(2)["first"] + runs(2)["rest"][0], strict=True):
        for key in ("loss", "grad_norm", "entropy", "old_kl"):
            assert two[key] == pytest.approx(one[key], rel=1e-5), key
    for name, tensor in part(runs(1)["saved"], "merged.").items():
        assert (runs(2)["saved"][f"merged.{name}"] - tensor).abs().mean() <= 1e-5, name


@pytest.mark.parametrize("ranks", [1, TWO])
def test_rollouts_score_as_the_policy(ranks, runs):
    """Law 1 after steps: an engine that got the merged weights gives the policy's log-probs within 1e-5."""
    assert runs(ranks)["mismatch"] <= 1e-5


@pytest.mark.parametrize("ranks", [1, TWO])
def test_resumed_bit_for_bit(ranks, runs):
    """Law 10: from the base model, the checkpoint's adapters and the optimizer's fp32 weights the rest is the same."""
    (metrics, state), (resumed_metrics, resumed) = runs(ranks)["rest"], runs(ranks)["resumed"]
    assert resumed_metrics == metrics
    assert equal(resumed, state)


def test_a_new_run_starts_from_the_merged_weights(runs):
    """With policy.model a LoRA run's checkpoint, the new adapters stand beside its merged weights and add nothing."""
    saved, new = (part(runs(1)[name], "merged.") for name in ("saved", "new run"))
    assert equal(new, saved) and equal(part(runs(1)["new run"], "base."), saved)


def test_the_frozen_weights_are_the_reference(runs):
    """algorithm.kl_coef: steps against the model with its adapters off are bit for bit those against a second model,
    and not those without a reference."""
    (metrics, state, none_loaded), (others, other, second_loaded) = (
        runs(1)[name] for name in ("own reference", "second model")
    )
    assert none_loaded and not second_loaded
    assert metrics == others and equal(state, other)
    assert metrics[1]["loss"] != runs(1)["first"][1]["loss"]


def test_the_checkpoint_is_a_model_and_an_adapter(runs, scratch, tiny_folder):  # noqa: F811
    """Its model folder is the merged model; its adapter makes of the base, in peft's hands, the same."""
    import peft  # after rethinker.policy's repair of torchvision

    expected, folder = part(runs(1)["saved"], "merged."), scratch / "checkpoint_1"
    assert equal(dict(load_model(folder, torch.float32).named_parameters()), expected)
    base = load_model(tiny_folder, torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload()
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=2**-23, atol=1e-8)


def test_another_base_is_refused(runs):
    """Resumed beside weights that have changed, or beside none, the run stops and names the model; if the same ones lie
    somewhere else, it goes on."""
    moved, trained, gone = runs(1)["refusals"]
    assert moved == ""
    assert "is no longer the one that this run's adapters were trained beside" in trained and "/base" in trained
    assert "could not be loaded" in gone and "/base" in gone


@pytest.mark.soak
def test_the_command_trains_and_resumes(tmp_path):
    """`rethinker.train` with policy.lora.rank, killed three times and resumed: logs, weights and optimizer are those of
    the run that nobody disturbed; other settings of policy.lora are refused."""
    import peft

    prepare(tmp_path)
    lora = ("--policy.lora.rank", "8", "--algorithm.kl_coef", "0.01")
    finish(tmp_path, "reference", *lora)
    print(*disturb(tmp_path, "killed", kills=3, seed=0, options=lora), sep="\n")
    finish(tmp_path, "killed", "--resume", "auto", *lora)
    assert_equal_runs(tmp_path / "killed", tmp_path / "reference")
    assert max(row["mismatch_kl"] for row in rows(tmp_path / "killed")) < 1e-9
    assert peft.LoraConfig.from_pretrained(tmp_path / "killed" / "checkpoints" / "last" / "adapter").r == 8
    with pytest.raises(AssertionError, match=r"cannot go on with policy\.lora\.rank=4 \(was 8\)"):
        finish(tmp_path, "reference", "--resume", "auto", *lora, "--policy.lora.rank", "4")
