"""ZeRO-3 on one and two gloo ranks, with every parameter really partitioned (laws 3, 5 and 12)."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch

from rethinker.config import AlgorithmConfig, PolicyConfig
from rethinker.policy.loading import load_model
from rethinker.policy.model import Policy
from rethinker.policy.packing import pack, plan_micro_batches
from tests import forked
from tests.integration import zero3_steps
from tests.integration.zero3_steps import SCENARIOS, scenario
from tests.policy.conftest import encoder, tiny_folder  # noqa: F401  (fixtures)
from tests.policy.helpers import per_sample_log_softmax


@pytest.fixture(scope="module")
def runs(tiny_folder, tmp_path_factory):  # noqa: F811
    """Results of the same steps on (ranks, micro-batch budget): by SDPA's mask, on two ranks by flash's segments."""
    scratch = tmp_path_factory.mktemp("zero3")
    results = {}
    for ranks, attention, budgets in ((1, "sdpa", (10_000, 60)), (2, "flash", (10_000,))):
        output = scratch / f"{ranks}.pt"
        arguments = [str(tiny_folder), str(scratch), str(output), attention, *map(str, budgets)]
        forked.run(partial(zero3_steps.main, *arguments), scratch / f"{ranks}.log", ranks)
        results |= {(ranks, budget): found for budget, found in torch.load(output, weights_only=False).items()}
    results["scratch"] = scratch
    return results


def relative_error(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Largest relative error over the tensors; tensors without gradient must agree on that."""
    assert set(ours) == set(theirs)
    return max(((ours[n] - t).norm() / t.norm().clamp(min=1e-6)).item() for n, t in theirs.items())


def test_two_ranks_partition_every_parameter(runs, tiny_folder):  # noqa: F811
    """On two ranks no parameter is held whole, or the tests below would test nothing."""
    parameters = len(list(load_model(tiny_folder, torch.float32).parameters()))
    assert runs[2, 10_000]["partitioned"] == parameters


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("other", [(1, 60), (2, 10_000)], ids=["small micro-batches", "two ranks"])
def test_step_is_independent_of_ranks_and_micro_batches(name, other, runs):
    """Law 3: loss and gradients are the same to 1e-5 relative, whatever the attention; law 5: every kind of batch
    trains."""
    expected, got = runs[1, 10_000][name], runs[other][name]
    for key in ("loss", "grad_norm", "entropy", "old_kl"):
        assert got["metrics"][key] == pytest.approx(expected["metrics"][key], rel=1e-5, abs=1e-7), key
    assert expected["metrics"]["skipped"] == got["metrics"]["skipped"] == 0
    assert relative_error(got["gradients"], expected["gradients"]) <= 1e-5


def test_step_equals_plain_pytorch(runs, tiny_folder, encoder):  # noqa: F811
    """One ZeRO-3 step equals autograd + clipping + AdamW on the unsharded model."""
    policy = Policy(load_model(tiny_folder, torch.float32), PolicyConfig(dtype="float32"))
    samples = scenario("mixed", runs["scratch"], encoder)
    (bundles,) = plan_micro_batches(samples, budget=10_000, world_size=1)[0]
    batch = pack(bundles, encoder.encode, encoder.pixels, policy.positions)
    logps, _ = policy(batch)
    advantages = batch.advantages.repeat_interleave(batch.cu_seqlens.diff())
    loss = -(torch.exp(logps - batch.old_logps) * advantages).mean()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in policy.hf.named_parameters()}
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    torch.optim.AdamW(policy.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0).step()
    for run in (runs[1, 10_000]["moved"], runs[2, 10_000]["moved"]):
        assert run["metrics"]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert run["metrics"]["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
        assert relative_error(run["gradients"], gradients) <= 1e-5
        for name, parameter in policy.hf.named_parameters():
            # Adam's first step is lr * g / (|g| + eps): where |g| is near eps it magnifies rounding, up to lr = 1e-3.
            assert (run["weights"][name] - parameter).abs().mean() <= 1e-6, name
    assert AlgorithmConfig().aggregation == "token"  # what the formula above assumes


@pytest.mark.parametrize("ranks", [1, 2])
def test_samples_without_a_gradient_are_left_out_of_the_computation_alone(ranks, runs):
    """The same loss and gradients as with their tokens computed, which count in the normalizer either way."""
    less, more = (runs[ranks, 10_000][name] for name in ("left out", "computed"))
    assert more["metrics"]["train_tokens"] - less["metrics"]["train_tokens"] == 3 * (12 - 1)  # a last token is no input
    for key in ("loss", "grad_norm"):
        assert less["metrics"][key] == pytest.approx(more["metrics"][key], rel=1e-5) != 0
    assert relative_error(less["gradients"], more["gradients"]) <= 1e-5


def test_frozen_comparison_would_notice_a_missed_normaliser(runs):
    """The losses of the scenarios differ, so equality above is not an accident of zeros."""
    losses = {name: runs[1, 10_000][name]["metrics"]["loss"] for name in SCENARIOS}
    assert losses.pop("equal rewards") == 0
    assert len({round(v, 6) for v in losses.values()}) == len(losses)


@pytest.mark.parametrize("ranks", [1, 2])
def test_non_finite_step_is_skipped(ranks, runs):
    """Law 12: a NaN behaviour log-prob on one rank skips the step on all; weights stay, the next step trains."""
    poisoned = runs[ranks, 10_000]["poisoned"]
    assert poisoned["metrics"]["skipped"] == 1
    assert poisoned["unchanged"] and poisoned["finite"] and poisoned["moved"]
    assert poisoned["recovered"]["skipped"] == 0


def test_every_response_is_scored_by_its_owner(runs):
    """One score per token, empty responses included, the same whether one rank or two share the work."""
    one, two = runs[1, 10_000]["scored"], runs[2, 10_000]["scored"]
    assert one.keys() == two.keys() and len(one) == 13
    for (_, _, tokens), scores in one.items():
        assert len(scores) == tokens and all(score < 0 for score in scores)
    for place, scores in two.items():
        assert scores == pytest.approx(one[place], abs=1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
def test_scoring_tells_how_far_the_policy_is_from_the_behaviour(runs, ranks):
    """The k3 estimate over all ranks' sampled tokens, whoever scored them; forced tokens do not count."""
    measured, expected = runs[ranks, 10_000]["score_kl"]
    assert measured == pytest.approx(expected, rel=1e-9) and measured > 0


def test_token_weights_are_the_same_on_any_number_of_ranks(runs, tiny_folder, encoder):  # noqa: F811
    """Entropies are those of the full logits; the threshold, the tokens kept and what a correction masks are of the
    whole episode's tokens, whoever scored them."""
    (one, of_one), (two, of_two) = (runs[ranks, 10_000]["weighed"] for ranks in (1, 2))
    assert two == pytest.approx(one, abs=1e-5) and 0 < one["correction_masked"] < 1
    model, ranked = load_model(tiny_folder, torch.float32), []
    for sample in scenario("mixed", runs["scratch"], encoder):
        place = sample.group, sample.index
        logps = per_sample_log_softmax(model, encoder, sample).detach().double()
        expected = -(logps.exp() * logps).sum(-1)
        assert of_one[place][0] == pytest.approx(expected.tolist(), abs=1e-5)
        assert of_two[place][0] == pytest.approx(expected.tolist(), abs=1e-5)
        kept = (np.float32(of_one[place][0]) >= one["top_entropy_threshold"]).tolist()
        assert of_one[place][1] == of_two[place][1] == kept
        ranked += expected.tolist()[place == (0, 0) :]  # its first token was forced
    assert one["top_entropy_threshold"] == pytest.approx(sorted(ranked)[-math.ceil(0.3 * len(ranked))], abs=1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_size_of_a_checkpoint_is_known_before_it_is_written(ranks, runs):
    """Weights, and the optimizer's pieces over all ranks: within a hundredth, headers and padding are the rest."""
    results = runs[ranks, 10_000]
    assert results["expected bytes"] == pytest.approx(results["written bytes"], rel=0.01)


@pytest.mark.parametrize("ranks", [1, 2])
def test_saved_checkpoint_loads_in_transformers(ranks, runs):
    """A checkpoint written from shards loads with transformers, weights and processor, and equals the live weights."""
    from rethinker.policy.loading import load_processor

    folder = runs["scratch"] / f"saved_{ranks}"
    model = load_model(folder, torch.float32)
    assert load_processor(folder).tokenizer is not None
    assert all(p.isfinite().all() for p in model.parameters())
    fresh = runs[ranks, 10_000]["moved"]["weights"]
    assert set(dict(model.named_parameters())) == set(fresh)
    assert any(not torch.equal(p, fresh[n]) for n, p in model.named_parameters())
