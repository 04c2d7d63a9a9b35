"""The objective's settings, its normaliser and its mask: laws 3 and 12 at the level of packed batches."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from rethinker.algorithm.advantages import assign_advantages
from rethinker.algorithm.objective import (
    has_gradient,
    load_loss,
    loss_inputs,
    loss_normalizer,
    shipped_losses,
    supervised_weight,
)
from rethinker.algorithm.replay import ReplayBuffer
from rethinker.config import AlgorithmConfig, ReplayConfig
from rethinker.samples import RemoteCompletion, Rethought
from rethinker_kernels import GRPO_STATS, policy_loss
from tests.algorithm.examples import completion, group, packed, sample, select

TRIGGER = Rethought(2, 4, "self_questioning", 2, 4)
SAMPLES = [
    sample(1.0, length=3),
    sample(-0.5, length=6, rethought=TRIGGER),
    sample(2.0, length=0),
    sample(-2.0, length=5),
]
# Every shipped loss, and those options of grpo that make another of it.
LOSSES = [{"loss": name} for name in shipped_losses()] + [{"importance": "sequence"}, {"dual_clip": 1.2}]


def logps_for(batch) -> torch.Tensor:
    """A policy a little off the behaviour policy; forced tokens have finite log-probs under it."""
    noise = torch.randn(len(batch.target_ids), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return (batch.old_logps.nan_to_num(-1.0) + 0.3 * noise).requires_grad_()


def run_loss(logps, batch, config, normalizer, ref_logps=None):
    """The loss and its statistics with the run's settings, without a supervised term."""
    inputs = loss_inputs(load_loss(config), batch, config, normalizer, ref_logps)
    assert inputs.pop("nll_weights") is None
    return policy_loss(logps, **inputs)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("settings", LOSSES, ids=str)
def test_any_split_and_order_gives_the_same_loss(aggregation, settings):
    """Law 3: loss and gradients do not depend on how samples are divided into micro-batches, nor on their order."""
    config = AlgorithmConfig(aggregation=aggregation, **settings)
    normalizer = loss_normalizer(SAMPLES, config, max_new_tokens=8)
    whole = packed(SAMPLES)
    logps = logps_for(whole)
    loss, stats = run_loss(logps, whole, config, normalizer)
    loss.backward()
    per_sample = logps.detach().split(whole.cu_seqlens.diff().tolist())
    gradients = logps.grad.split(whole.cu_seqlens.diff().tolist())
    for split in ([[3], [1], [0, 2]], [[2, 1, 0], [3]], [[2], [3, 0, 1]]):
        total, total_stats = 0.0, 0.0
        for indices in split:
            part = torch.cat([per_sample[i] for i in indices]).requires_grad_()
            part_loss, part_stats = run_loss(part, packed([SAMPLES[i] for i in indices]), config, normalizer)
            part_loss.backward()
            torch.testing.assert_close(part.grad, torch.cat([gradients[i] for i in indices]))
            total, total_stats = total + part_loss.detach(), total_stats + part_stats
        torch.testing.assert_close(total, loss.detach())
        torch.testing.assert_close(total_stats, stats)


def test_every_setting_reaches_the_loss():
    """Changing any setting of the objective changes the loss: none is dropped on the way."""
    batch = packed(SAMPLES)
    logps = logps_for(batch).detach()
    reference = logps - 0.5 * torch.rand(len(logps), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    base = {"clip_low": 0.05, "clip_high": 0.05, "dual_clip": 1.2, "kl_coef": 0.1}
    changes = {"clip_low": 0.1, "clip_high": 0.1, "dual_clip": 1.1, "kl_coef": 0.2, "kl_estimator": "k1",
               "importance": "sequence", "aggregation": "sequence"}  # fmt: skip
    losses = [
        run_loss(logps, batch, AlgorithmConfig(**base | change), 5.0, ref_logps=reference)[0].item()
        for change in ({}, *({k: v} for k, v in changes.items()))
    ]
    assert len({round(loss, 9) for loss in losses}) == len(losses)
    assert run_loss(logps, batch, AlgorithmConfig(**base), 10.0, ref_logps=reference)[0].item() == losses[0] / 2


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_the_entropy_bonus_lies_around_the_loss(aggregation):
    """Whatever the loss: less entropy_coef times the entropies, of the tokens that count, averaged as the loss is."""
    batch = packed(SAMPLES)
    logps = logps_for(batch).detach()
    entropies = torch.rand(len(logps), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    values = []
    for weight in (0.0, 0.3):
        config = AlgorithmConfig(entropy_coef=weight, aggregation=aggregation, importance="sequence")
        inputs = loss_inputs(load_loss(config), batch, config, 4.0)
        del inputs["nll_weights"]
        values.append(policy_loss(logps, **inputs, entropies=entropies)[0].item())
    spans = zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True)
    sums = [(entropies[a:b][batch.loss_mask[a:b]].sum().item(), int(batch.loss_mask[a:b].sum())) for a, b in spans]
    want = sum(total / max(count, 1) if aggregation == "sequence" else total for total, count in sums)
    assert values[1] - values[0] == pytest.approx(-0.3 * want / 4, rel=1e-9)


def test_forced_tokens_carry_no_gradient():
    """The trigger's tokens (NaN behaviour log-probs) get gradient exactly 0, all others of the response do not."""
    batch = packed([SAMPLES[1]])
    logps = batch.old_logps.nan_to_num(-1.0).requires_grad_()
    loss, stats = run_loss(logps, batch, AlgorithmConfig(), 4.0)
    loss.backward()
    assert loss.isfinite() and logps.grad.eq(0).tolist() == [False, False, True, True, False, False]
    assert stats[GRPO_STATS.index("tokens")] == 4


@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
@pytest.mark.parametrize("settings", LOSSES, ids=str)
def test_a_broken_behaviour_log_prob_is_not_masked(bad, settings):
    """Law 12: a sampled token with a non-finite log-prob makes the loss NaN, so that the step is skipped."""
    batch = packed(SAMPLES)
    logps = logps_for(batch)
    batch.old_logps[1] = bad
    assert run_loss(logps, batch, AlgorithmConfig(**settings), 4.0)[0].isnan()


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_weight_zero_changes_nothing(aggregation):
    """Padding samples of weight 0 add nothing to loss, statistics or normaliser, whatever their log-probs."""
    config = AlgorithmConfig(aggregation=aggregation)
    padding = sample(3.0, length=4)
    padding.weight = 0.0
    padding.completion.logprobs[1] = math.nan
    assert loss_normalizer([*SAMPLES, padding], config, 8) == loss_normalizer(SAMPLES, config, 8)
    batch, padded = packed(SAMPLES), packed([*SAMPLES, padding])
    logps = logps_for(batch).detach()
    got = run_loss(torch.cat([logps, torch.zeros(4, dtype=torch.float64)]), padded, config, 4.0)
    torch.testing.assert_close(got, run_loss(logps, batch, config, 4.0))


@pytest.mark.parametrize("settings", LOSSES, ids=str)
@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_what_has_no_gradient_is_known_before_it_is_computed(settings, aggregation):
    """Without an advantage loss and gradient of every shipped loss are exactly 0, on policy and far off it; a KL
    term's are not, and a loss of the user's, or a supervised term, may need none."""
    config = AlgorithmConfig(**settings, aggregation=aggregation)
    idle = sample(0.0, length=6)
    batch = packed([sample(1.0, length=3), idle])
    logps = logps_for(batch)
    with torch.no_grad():
        logps[3:] += torch.tensor([0.0, 30.0, -30.0, 0.2, -0.2, 1.0])
    loss = run_loss(logps, batch, config, 4.0)[0]
    loss.backward()
    assert not has_gradient(idle, config) and not logps.grad[3:].any() and logps.grad[:3].any()
    assert loss == run_loss(logps[:3], packed([sample(1.0, length=3)]), config, 4.0)[0]
    assert has_gradient(sample(-0.5, length=6), config)
    with_kl = dataclasses.replace(config, kl_coef=0.1)
    logps.grad = None
    run_loss(logps, batch, with_kl, 4.0, logps.detach() - 0.1)[0].backward()  # the KL's, and of an advantage of 0
    assert has_gradient(idle, with_kl) and logps.grad[3:].all()
    assert has_gradient(idle, dataclasses.replace(config, entropy_coef=0.1))
    assert has_gradient(idle, dataclasses.replace(config, loss="mine.py:loss"))
    assert has_gradient(sample(0.0, length=6, rethought=TRIGGER), config)


def test_importance_weights_scale_their_sample():
    """A sample of weight 2 counts like the sample twice."""
    heavy = sample(1.5, length=3)
    heavy.weight = 2.0
    once, twice = packed([heavy]), packed([sample(1.5, length=3)] * 2)
    one = logps_for(once).detach()
    config = AlgorithmConfig()
    torch.testing.assert_close(
        run_loss(one, once, config, 6.0)[0], run_loss(torch.cat([one, one]), twice, config, 6.0)[0]
    )


def test_normalizer_counts_what_the_aggregation_means():
    """Trainable tokens of the whole batch; samples; or samples times the constant length."""
    for aggregation, expected in (("token", 3 + 4 + 0 + 5), ("sequence", 4), ("constant", 4 * 100)):
        assert loss_normalizer(SAMPLES, AlgorithmConfig(aggregation=aggregation), 100) == expected
        assert loss_normalizer([], AlgorithmConfig(aggregation=aggregation), 100) == 1.0


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_a_step_without_tokens_has_loss_zero(aggregation):
    """Only empty responses, or no sample at all: loss 0, differentiable, not 0 / 0."""
    config = AlgorithmConfig(aggregation=aggregation)
    for samples in ([], [sample(1.0, length=0)] * 2):
        batch = packed(samples)
        logps = logps_for(batch)
        loss, _ = run_loss(logps, batch, config, loss_normalizer(samples, config, 8))
        loss.backward()
        assert loss.item() == 0


def test_mask_is_the_triggers_span():
    """Only [trigger_start, trigger_end) is masked; a NaN elsewhere is a fault and stays unmasked."""
    plain = completion(4)
    plain.logprobs[2] = math.nan
    assert plain.trainable.tolist() == [True] * 4
    assert completion(6, TRIGGER).trainable.tolist() == [True, True, False, False, True, True]
    assert completion(4, Rethought(1, 4, "x", 1, 4)).trainable.tolist() == [True, False, False, False]
    assert completion(0).trainable.tolist() == []


def test_supervised_weight_is_a_mean_over_rethought_tokens():
    """rethink.supervised_weight times the mean -log p of all rethought responses' tokens, wherever they are held."""
    rethought = [sample(1.0, length=6, rethought=TRIGGER), sample(1.0, length=5, rethought=TRIGGER)]
    away = dataclasses.replace(rethought[1], completion=RemoteCompletion(9, 7, supervised=True))
    assert supervised_weight([*SAMPLES, rethought[0]], 0.05) == 0.05 / 12  # SAMPLES holds one of 6 tokens
    assert supervised_weight([rethought[0], away], 0.1) == 0.1 / 15
    assert supervised_weight([sample(1.0, length=3)], 0.05) == 0.0 == supervised_weight([], 0.05)


def test_the_masked_span_decides():
    """Which tokens carry a policy gradient is the masked span's to say: y1 too, or none; the count agrees."""
    for span in ((2, 4), (0, 4), (0, 0), (0, 2)):
        one = completion(6, Rethought(2, 4, "x", *span))
        mask = one.trainable
        assert [i for i, trained in enumerate(mask) if not trained] == list(range(*span))
        assert one.trainable_tokens == sum(mask)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("name", ["grpo", "filter", "ssr"])
def test_masked_responses_are_as_if_they_were_not_in_the_batch(name, aggregation):
    """train.mask_truncated: the loss and the gradient of each kept token are those of the batch in which the truncated
    samples weigh nothing, in the mean neither; their rewards still count in their group's advantages."""
    groups = [group([1.0, 0.0, 0.0, 1.0], "a"), group([0.0, 0.0, 1.0, 0.0], "b")]
    for one in groups:
        one.completions = [completion(length) for length in (3, 6, 2, 5)]
        one.truncated = [False, True, False, False]
    groups[1].truncated = [False, False, True, True]
    assign_advantages(groups, AlgorithmConfig(), {})
    kept = select(groups, name=name, pairs=0, replay=ReplayBuffer(ReplayConfig(), 0), mask_truncated=True).samples
    assert [(s.query.id, s.index) for s in kept] == [("a", 0), ("a", 2), ("a", 3), ("b", 0), ("b", 1)]
    assert {s.query.id: s.advantage for s in kept} == pytest.approx({"a": 0.75**0.5, "b": -0.5}, abs=1e-4)

    config = AlgorithmConfig(aggregation=aggregation)
    everything = [s for one in groups for s in one.samples()]
    whole = [dataclasses.replace(s, weight=float(not one.truncated[s.index])) for one in groups for s in one.samples()]
    losses, gradients = [], []
    logps = dict(
        zip(
            [(s.query.id, s.index) for s in everything],
            logps_for(packed(everything)).detach().split([3, 6, 2, 5] * 2),
            strict=True,
        )
    )
    for samples in (kept, whole):
        given = torch.cat([logps[s.query.id, s.index] for s in samples]).requires_grad_()
        loss, _ = run_loss(given, packed(samples), config, loss_normalizer(samples, config, max_new_tokens=8))
        loss.backward()
        losses.append(loss.item())
        gradients.append(
            dict(
                zip(
                    [(s.query.id, s.index) for s in samples],
                    given.grad.split([s.completion.tokens for s in samples]),
                    strict=True,
                )
            )
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-12) != 0
    for place, gradient in gradients[1].items():
        torch.testing.assert_close(gradient, gradients[0].get(place, torch.zeros_like(gradient)), rtol=1e-12, atol=0)
        assert gradient.any() == (place in gradients[0])
