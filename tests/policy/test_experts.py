"""Routers in training: transformers' own choices, replayed ones, and how evenly they fall."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from rethinker.config import DataConfig
from rethinker.data.prompts import PromptEncoder
from rethinker.policy.experts import GroupedRouter, Router, load_statistics
from rethinker.policy.loading import load_model, load_processor
from rethinker.policy.model import compile_layers
from tests.families.tiny_models import create
from tests.policy.helpers import queries_of_every_kind, samples_for
from tests.policy.switches import errors, make, outcome
from tests.policy.test_packing import packed


@pytest.fixture(scope="module", params=["qwen3_vl_moe", "glm4v_moe"])
def folder(request, tmp_path_factory):
    return create(request.param, tmp_path_factory.mktemp("model"))


@pytest.fixture
def encoder(folder):
    return PromptEncoder(load_processor(folder), DataConfig(min_pixels=1024, max_pixels=8192))


@pytest.fixture
def samples(encoder, tmp_path):
    return samples_for(queries_of_every_kind(tmp_path), encoder, [5, 1, 9])


def choices(policy, batch):
    """[T, layers, k]: the experts that the policy takes for the row's tokens, 0 in layers without."""
    taken = torch.zeros(batch.tokens, 3, 2, dtype=torch.int16)

    def note(number, router, made):
        taken[:, number] = (made[2] if router.real is None else made[2][router.real]).short()

    hooks = [
        router.register_forward_hook(lambda router, _, made, number=number: note(number, router, made))
        for number, router in policy.routers.items()
    ]
    policy(batch)
    for hook in hooks:
        hook.remove()
    return taken


def by_expert(logits, weights, experts):
    """What a router returns, each token's experts in the order of their numbers: which comes first means nothing."""
    experts, order = experts.sort(dim=1)
    return logits, weights.gather(1, order), experts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_router_is_transformers_own_but_for_the_rounding(dtype, folder):
    """In fp32 to the bit; in bf16 the choice is the same, and weights are what transformers rounds."""
    policy, plain = make(folder), load_model(folder, torch.float32)
    plain.load_state_dict(policy.hf.state_dict())
    ours, theirs = (m.model.language_model.layers[2].mlp.gate.to(dtype) for m in (policy.hf, plain))
    hidden = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    found, expected = by_expert(*ours(hidden)), by_expert(*theirs(hidden))
    assert type(ours) is not type(theirs) and found[1].dtype == torch.float32
    for part, right in zip(found, expected, strict=True):
        assert torch.equal(part.to(right.dtype), right)
    assert (found[1].sum(1) - getattr(ours, "routed_scaling_factor", 1)).abs().max() < 1e-6


@pytest.mark.parametrize("kernel", ["sdpa", "flash"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_replayed_choice_is_taken(checkpointing, kernel, folder, encoder, samples):
    """Replaying the policy's own choices changes nothing, to the bit, in log-probs and gradients; with one token's
    choice in one layer planted otherwise, the log-probs behind it change, and the router learns from that choice."""
    policy = make(folder, attention=kernel, gradient_checkpointing=checkpointing)
    (batch,), _ = packed(samples, encoder, policy)
    own = choices(policy, batch)
    assert all((own[:, number].max(1).values < 8).all() and own[:, number].any() for number in policy.routers)
    logps, gradients = outcome(policy, batch)
    again = outcome(policy, replace(batch, experts=own))
    assert torch.equal(again[0], logps) and all(torch.equal(again[1][name], g) for name, g in gradients.items())
    planted, spot = own.clone(), int(batch.source_index[2])  # a token of the first response
    first = min(policy.routers)
    planted[spot, first] = (own[spot, first] + 1 + own[spot, first].flip(0)) % 8
    planted[spot, first, 1] += planted[spot, first, 0] == planted[spot, first, 1]
    found, moved = outcome(policy, replace(batch, experts=planted))
    changed = (found - logps).abs() > 1e-4
    assert changed.any() and not changed[:2].any() and not changed[5:].any()  # of 5 tokens the last three
    name = f"hf.model.language_model.layers.{first}.mlp.gate.weight"
    assert not torch.equal(moved[name], gradients[name]) and moved[name].any()


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("replayed", [True, False])
def test_weights_are_those_of_the_experts_that_are_taken(replayed, normalized):
    """The softmax over all experts at the ones taken, divided by its sum there if the model says so."""
    generator = torch.Generator().manual_seed(0)
    router, hidden = Router(), torch.randn(5, 6, generator=generator)
    router.weight, router.top_k = torch.nn.Parameter(torch.randn(8, 6, generator=generator)), 2
    router.norm_topk_prob = normalized
    probabilities = (hidden @ router.weight.T).softmax(-1)
    taken = probabilities.topk(2).indices
    if replayed:
        taken = router.chosen = (taken + 3) % 8
    expected = probabilities.gather(1, taken)
    _, weights, experts = router(hidden)
    assert torch.equal(experts, taken)
    torch.testing.assert_close(weights, expected / expected.sum(-1, keepdim=True) if normalized else expected)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("replayed", [True, False])
def test_groups_are_chosen_before_their_experts(replayed, normalized):
    """Of each token in turn: corrected scores rank the groups, by their best two, and then these groups' experts; the
    weights are those of plain scores."""
    generator = torch.Generator().manual_seed(0)
    router, hidden = GroupedRouter(), torch.randn(50, 6, generator=generator)
    router.weight, router.top_k = torch.nn.Parameter(torch.randn(12, 6, generator=generator)), 3
    router.num_group, router.topk_group, router.routed_scaling_factor = 3, 2, 2.5
    router.norm_topk_prob = normalized
    router.e_score_correction_bias = 0.5 * torch.randn(12, generator=generator)
    scores = (hidden @ router.weight.T).sigmoid()
    taken = []
    for corrected in (scores + router.e_score_correction_bias).tolist():
        groups = [range(start, start + 4) for start in (0, 4, 8)]
        groups.sort(key=lambda group, of=corrected: sum(sorted(of[i] for i in group)[-2:]))
        best = sorted([*groups[1], *groups[2]], key=lambda i, of=corrected: of[i])[-3:]
        taken.append(sorted(best))
    taken = torch.tensor(taken)
    assert not torch.equal(taken, scores.topk(3).indices.sort(dim=1).values)
    if replayed:
        taken = router.chosen = ((taken + 3) % 12).sort(dim=1).values
    expected = scores.gather(1, taken)
    expected = 2.5 * (expected / expected.sum(-1, keepdim=True) if normalized else expected)
    _, weights, experts = by_expert(*router(hidden))
    assert torch.equal(experts, taken)
    torch.testing.assert_close(weights, expected)


def test_a_row_takes_the_choices_of_its_samples(folder, encoder, samples):
    """Each response has its own, and a prompt those of the latest policy that answered it."""
    policy = make(folder)
    rng = np.random.default_rng(0)
    for number, sample in enumerate(samples):
        shape = (sample.prompt_tokens + sample.completion.tokens - 1, 3, 2)
        sample.completion.experts = rng.integers(0, 8, shape, dtype=np.uint8)
        sample.policy_version = number % 3
    (batch,), (bundles,) = packed(samples, encoder, policy)
    expected = []
    for bundle in bundles:
        prompt = bundle.samples[0].prompt_tokens
        expected.append(bundle.samples[2].completion.experts[:prompt])
        expected += [sample.completion.experts[prompt:] for sample in bundle.samples]
    assert batch.experts.dtype == torch.int16
    assert np.array_equal(batch.experts.numpy(), np.concatenate(expected)) and len(batch.experts) == batch.tokens


@pytest.mark.parametrize("kernel", ["sdpa", "flash"])
def test_load_is_what_the_tokens_took(kernel, folder, encoder, samples):
    """Every token counts once, with padding of the kernel's rows left out."""
    policy = make(folder, attention=kernel)
    (batch,), _ = packed(samples, encoder, policy)
    taken = choices(policy, batch)
    for number, router in policy.routers.items():
        assert torch.equal(router.load, torch.bincount(taken[:, number].flatten().long(), minlength=8).float())


def test_statistics_of_a_load():
    """1 is an even share; an expert without a token is unused; a step without a token says nothing."""
    found = load_statistics(torch.tensor([[2.0, 2.0, 2.0, 2.0], [6.0, 2.0, 0.0, 0.0]], dtype=torch.float64))
    assert found == {"expert_load_max": 3.0, "expert_load_mean": 2.0, "experts_unused": 0.25}
    for load in (torch.zeros(2, 4), torch.zeros(0, 0)):
        assert load_statistics(load) == dict.fromkeys(found)


def test_compiled_layers_leave_experts_apart(folder, encoder, samples, monkeypatch):
    """policy.compile: no graph has the experts' products, which inductor cannot make on a CPU; the results are those
    of plain layers."""
    traced = []

    def keep(graph, _):
        traced.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    monkeypatch.setattr("rethinker.policy.model.compile_layers", partial(compile_layers, backend=keep))
    torch._dynamo.reset()
    plain, compiled = make(folder), make(folder, compile=True)
    (batch,), _ = packed(samples, encoder, plain)
    logp_error, gradient_error = errors(outcome(compiled, batch), outcome(plain, batch))
    assert logp_error <= 1e-5 and gradient_error <= 1e-5
    assert traced and not any("grouped_mm" in name for name in traced)
