"""Every shipped loss and every preset of a method against its paper's formula, written out token by token in fp64."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from rethinker.algorithm.advantages import assign_advantages
from rethinker.algorithm.objective import load_loss, loss_inputs, loss_normalizer, shipped_losses
from rethinker.config import AlgorithmConfig
from rethinker.samples import Rethought, Sample
from rethinker.settings import presets, resolve_config
from rethinker_kernels import linear, linear_policy_loss, linear_selective_log_softmax, policy_loss
from tests.algorithm.examples import group, packed, sample
from tests.algorithm.test_advantages import dr_grpo, reinforce_pp, rloo
from tests.algorithm.test_advantages import grpo as grpo_advantages

LENGTH = 8  # rollout.max_new_tokens

# The papers' formulas. Each gets the log-probs of one response's tokens that count, now and when they were sampled, as
# lists of numbers that autograd follows, and the advantage; it returns the loss of each of these tokens.


def grpo(now, old, A, low=0.2, high=0.2, dual=None):
    """DeepSeekMath (2402.03300), equation 3; two bounds are DAPO's (2503.14476), `dual` is 1912.09729's."""
    losses = []
    for p, q in zip(now, old, strict=True):
        ratio = (p - q).exp()
        clipped = min(max(ratio, torch.tensor(1 - low)), torch.tensor(1 + high))
        surrogate = min(ratio * A, clipped * A)
        if dual is not None and A < 0:
            surrogate = max(surrogate, torch.tensor(dual * A))
        losses.append(-surrogate)
    return losses


def gspo(now, old, A, low=3e-4, high=4e-4):
    """GSPO (2507.18071), equations 5 to 7: (pi(y) / pi_old(y))^(1 / |y|), one for the response."""
    ratio = (sum(now) / len(now) - sum(old) / len(old)).exp()
    clipped = min(max(ratio, torch.tensor(1 - low)), torch.tensor(1 + high))
    return [-min(ratio * A, clipped * A)] * len(now)


def cispo(now, old, A, high=0.2):
    """CISPO (2506.13585), equations 4 and 5: sg(clip(r)) A log pi, without a lower bound."""
    return [-min(math.exp(p.item() - q.item()), 1 + high) * A * p for p, q in zip(now, old, strict=True)]


def sapo(now, old, A, positive=1.0, negative=1.05):
    """SAPO (2511.20347), equations 5 and 6: f(r) = (4 / tau) / (1 + exp(-tau (r - 1)))."""
    tau = positive if A > 0 else negative
    return [-4 / tau / (1 + (-tau * ((p - q).exp() - 1)).exp()) * A for p, q in zip(now, old, strict=True)]


def gmpo(now, old, A, low=0.4, high=0.4):
    """GMPO (2507.20673), equation 4: the |o|-th root of the product of min(r |A|, clip(r) |A|), with A's sign."""
    sign = 1.0 if A > 0 else -1.0
    product = torch.tensor(1.0)
    for p, q in zip(now, old, strict=True):
        ratio = (p - q).exp()
        clipped = min(max(ratio, torch.tensor(math.exp(-low))), torch.tensor(math.exp(high)))
        product = product * abs(min(ratio * sign, clipped * sign)) * abs(A)
    return [-sign * (product ** (1 / len(now)) if A else product * 0)] * len(now)


def kl(now, ref, estimator):
    """Schulman's estimators, of KL(pi || pi_ref): with r = pi_ref / pi, -log r, (log r)^2 / 2, r - 1 - log r."""
    ratios = [(q - p).exp() for p, q in zip(now, ref, strict=True)]
    return [{"k1": -r.log(), "k2": r.log() ** 2 / 2, "k3": r - 1 - r.log()}[estimator] for r in ratios]


def added_up(formula, samples, logps, ref=None, aggregation="token", estimator="k3", coef=0.0):
    """The scalar loss: a response's tokens that count, times its weight, over the tokens, responses or a constant."""
    total, tokens, responses, at = torch.tensor(0.0), 0, 0, 0
    for one in samples:
        here, old = logps[at : at + one.completion.tokens], torch.tensor(one.completion.logprobs)
        span = one.completion.rethought
        counts = [i for i in range(len(here)) if not (span and span.masked_start <= i < span.masked_end)]
        then = at
        at += one.completion.tokens
        if one.weight == 0:
            continue
        responses += 1
        tokens += len(counts)
        if not counts:
            continue
        losses = formula([here[i] for i in counts], [old[i].double() for i in counts], one.advantage)
        if ref is not None:
            terms = kl([here[i] for i in counts], [ref[then + i] for i in counts], estimator)
            losses = [loss + coef * term for loss, term in zip(losses, terms, strict=True)]
        share = sum(losses) * one.weight
        total = total + (share / len(counts) if aggregation == "sequence" else share)
    return total / {"token": tokens, "sequence": responses, "constant": responses * LENGTH}[aggregation]


@pytest.fixture(autouse=True)
def fp64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def ragged(seed: int) -> tuple[list[Sample], torch.Tensor, torch.Tensor]:
    """Responses of 0 to 8 tokens, advantages of both signs and 0, a masked span, weights other than 1, one of 0; the
    log-probs of the policy and of a reference, on policy up to far beyond every clip."""
    g = torch.Generator().manual_seed(seed)
    lengths = [3, 1, 0, 8, 6, 5, 4, 2]
    advantages = [1.3, -0.7, 1.0, -1.6, 0.9, 0.0, 2.0, -0.4]
    order = torch.randperm(8, generator=g).tolist()
    samples = [sample(advantages[i], length=n) for i, n in zip(order, lengths, strict=True)]
    samples[4].completion.rethought = Rethought(1, 3, "x", 1, 4)
    samples[0].weight, samples[3].weight, samples[6].weight = 0.0, 1.7, 0.3
    old = torch.cat([torch.tensor(one.completion.logprobs).double() for one in samples])
    size = torch.tensor([0.0, 1e-4, 0.1, 0.5, 1.5])[torch.randint(5, old.shape, generator=g)]
    return samples, old + size * torch.randn(old.shape, generator=g), old + 0.4 * torch.randn(old.shape, generator=g)


def inputs_of(config, samples, ref=None):
    """What `policy_loss` gets in a step on these samples."""
    inputs = loss_inputs(load_loss(config), packed(samples), config, loss_normalizer(samples, config, LENGTH), ref)
    assert inputs.pop("nll_weights") is None
    return inputs


def ours(config, samples, logps, ref=None):
    return policy_loss(logps, **inputs_of(config, samples, ref))[0]


FORMULAS = {
    "grpo": ({}, grpo),
    "clip-higher": ({"clip_low": 0.1, "clip_high": 0.28}, partial(grpo, low=0.1, high=0.28)),
    "dual clip": ({"dual_clip": 1.5}, partial(grpo, dual=1.5)),
    "gspo": ({"importance": "sequence", "clip_low": 0.05, "clip_high": 0.1}, partial(gspo, low=0.05, high=0.1)),
    "cispo": ({"loss": "cispo", "clip_high": 0.3}, partial(cispo, high=0.3)),
    "sapo": ({"loss": "sapo", "tau_positive": 0.8, "tau_negative": 2.5}, partial(sapo, positive=0.8, negative=2.5)),
    "gmpo": ({"loss": "gmpo", "clip_low": 0.3, "clip_high": 0.1}, partial(gmpo, low=0.3, high=0.1)),
}


def same(config, formula, seed, **about):
    """Value and gradient of ours are the formula's."""
    samples, logps, ref = ragged(seed)
    ref = ref if config.kl_coef else None
    values, gradients = [], []
    for loss in (partial(ours, config), partial(added_up, formula, **about)):
        leaf = logps.clone().requires_grad_()
        values.append(loss(samples, leaf, ref))
        gradients.append(torch.autograd.grad(values[-1], leaf)[0])
    torch.testing.assert_close(*values, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    assert gradients[0].count_nonzero() > 3


def test_every_shipped_loss_has_its_formula_here():
    """A new loss joins the table."""
    assert {AlgorithmConfig(**settings).loss for settings, _ in FORMULAS.values()} == set(shipped_losses())


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("seed", range(2))
def test_a_loss_is_its_papers_formula(name, aggregation, seed):
    """Value and gradient, on ragged batches off policy beyond the clips, with masks, weights and zero advantages."""
    settings, formula = FORMULAS[name]
    same(AlgorithmConfig(**settings, aggregation=aggregation), formula, seed, aggregation=aggregation)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_the_kl_term_goes_with_every_loss(name, estimator, aggregation):
    """algorithm.kl_coef times each estimator, once, at every token that counts, also without an advantage."""
    settings, formula = FORMULAS[name]
    config = AlgorithmConfig(**settings, kl_coef=0.3, kl_estimator=estimator, aggregation=aggregation)
    same(config, formula, 0, aggregation=aggregation, estimator=estimator, coef=0.3)


# What each paper says: its loss, the aggregation, and the advantage of a group among the episode's.
METHODS = {
    "dapo": (partial(grpo, low=0.2, high=0.28), "token", grpo_advantages),
    "dr_grpo": (partial(grpo, low=0.2, high=0.2), "constant", dr_grpo),
    "gspo": (partial(gspo, low=3e-4, high=4e-4), "sequence", grpo_advantages),
    "cispo": (partial(cispo, high=4.0), "token", grpo_advantages),
    "sapo": (partial(sapo, positive=1.0, negative=1.05), "sequence", grpo_advantages),
    "gmpo": (partial(gmpo, low=0.4, high=0.4), "sequence", grpo_advantages),
    "rloo": (partial(grpo, low=0.2, high=0.2), "constant", rloo),
    "reinforce_pp": (partial(grpo, low=0.2, high=0.2), "token", reinforce_pp),
}


def test_every_preset_of_a_method_is_here():
    """Those that change the algorithm, but for the paper's own: its released code, and its set-up in 16 bits."""
    plain = resolve_config("sums_cpu").algorithm
    changed = {name for name in presets() if resolve_config(f"sums_cpu+{name}").algorithm != plain}
    assert changed - {"released_code", "virl39k"} == set(METHODS)


@pytest.mark.parametrize("recipe", ["sums_cpu", "qwen2_5_vl_7b"])
@pytest.mark.parametrize("name", METHODS)
def test_a_preset_is_its_papers_method(name, recipe):
    """Loss, gradient and advantages of a run with the preset are those of the paper, with the paper's values."""
    config = resolve_config(f"{recipe}+{name}").algorithm
    formula, aggregation, advantages = METHODS[name]
    same(config, formula, 1, aggregation=aggregation)
    rewards = [[1.0, 0.0, 0.0, 1.0, 0.0], [1.0] * 4, [0.0, 0.5, 1.0], [0.0, 0.0]]
    groups = list(map(group, rewards))
    assign_advantages(groups, config, {})
    for of_group, expected in zip(groups, advantages(rewards), strict=True):
        assert of_group.advantages == pytest.approx(expected, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("name", ["gspo", "gmpo"])
def test_a_response_counts_once_whatever_its_length(name):
    """The presets of losses per response: one of 8 tokens moves the loss as much as one of 2 with the same ratio."""
    config = resolve_config(f"sums_cpu+{name}").algorithm
    losses = []
    for length in (2, 8):
        samples = [sample(1.0, length=length), sample(-1.0, length=3)]
        old = packed(samples).old_logps
        losses.append(ours(config, samples, torch.cat([old[:length] - 0.01, old[length:]])))
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("name", sorted(FORMULAS.keys() - {"cispo"}))
@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_gradients_are_finite_differences(name, aggregation):
    """Of every loss without a stop-gradient, with a KL term: the slope of the value that is minimised."""
    config = AlgorithmConfig(**FORMULAS[name][0], aggregation=aggregation, kl_coef=0.2)
    samples, logps, ref = ragged(2)
    inputs = inputs_of(config, samples, ref)
    assert torch.autograd.gradcheck(lambda leaf: policy_loss(leaf, **inputs)[0], (logps.requires_grad_(),))


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize(("aggregation", "kl_coef"), [("token", 0.0), ("sequence", 0.3), ("constant", 0.3)])
def test_the_head_in_chunks_is_the_open_path(name, aggregation, kl_coef, monkeypatch):
    """linear_policy_loss, which makes slopes chunk by chunk and never holds the logits: loss and the gradients of
    hidden states and head are those of autograd through log-probs that are all there."""
    monkeypatch.setattr(linear, "chunk_rows", lambda *_: (3, 4))
    config = AlgorithmConfig(**FORMULAS[name][0], aggregation=aggregation, kl_coef=kl_coef)
    samples, _, ref = ragged(0)
    inputs = inputs_of(config, samples, ref if kl_coef else None)
    rows = len(ref)
    hidden, weight = torch.randn(rows, 3).requires_grad_(), torch.randn(6, 3).requires_grad_()
    index = torch.randint(6, (rows,))
    got, logps, stats = linear_policy_loss(hidden, weight, index, **inputs)
    want_logps = linear_selective_log_softmax(hidden, weight, index)
    want, want_stats = policy_loss(want_logps, **inputs)
    torch.testing.assert_close((got, logps, stats[:-1]), (want, want_logps.detach(), want_stats))
    leaves = (hidden, weight)
    torch.testing.assert_close(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves))
