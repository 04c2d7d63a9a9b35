"""GRPO's loss against the formulas written out token by token, and the laws of what adds a loss up."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from torch.autograd import gradcheck

from rethinker_kernels import GRPO_STATS, grpo_loss, linear_grpo_loss, losses

LENGTHS = [3, 1, 0, 4, 2]  # one sequence is empty
OFFSETS = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
ROWS, SEQUENCES = sum(LENGTHS), len(LENGTHS)


def case(seed: int = 23) -> dict[str, torch.Tensor]:
    """Inputs [R] in float64 with ratios on both sides of every clip, some masked rows and one masked sequence."""
    g = torch.Generator().manual_seed(seed)
    logps = -3 * torch.rand(ROWS, generator=g, dtype=torch.float64)
    return {
        "logps": logps,
        "old_logps": logps - 1.5 * torch.randn(ROWS, generator=g, dtype=torch.float64),
        "ref_logps": logps + torch.randn(ROWS, generator=g, dtype=torch.float64),
        "advantages": torch.tensor([1.2, -0.7, 0.4, -1.1, 0.9], dtype=torch.float64),
        "weights": torch.tensor([1.0, 0.5, 1.0, 2.0, 0.0], dtype=torch.float64),
        "mask": torch.tensor([True, False, True, True, True, True, True, False, True, True]),
        "cu_seqlens": OFFSETS,
    }


def naive(
    logps, old_logps, advantages, *, cu_seqlens, mask, weights, normalizer, ref_logps=None, clip_low=0.2, clip_high=0.2,
    dual_clip=None, kl_coef=0.0, kl_estimator="k3", importance="token", aggregation="token",
):  # fmt: skip
    """The objective as METHOD writes it, one token at a time, in Python floats."""
    bounds = cu_seqlens.tolist()
    total, counts = 0.0, dict.fromkeys(GRPO_STATS, 0.0)
    for s, (start, end) in enumerate(itertools.pairwise(bounds)):
        tokens = [t for t in range(start, end) if mask[t] and weights[s] != 0]
        logs = {t: (logps[t] - old_logps[t]).item() for t in tokens}
        mean_log = sum(logs.values()) / len(logs) if logs else 0.0
        losses = []
        for t in tokens:
            rho = math.exp(logs[t] if importance == "token" else mean_log)
            a = advantages[s].item()
            objective = min(rho * a, min(max(rho, 1 - clip_low), 1 + clip_high) * a)
            if a < 0 and dual_clip is not None:
                counts["dual_clipped"] += objective < dual_clip * a
                objective = max(objective, dual_clip * a)
            loss = -objective
            if ref_logps is not None:
                d = (ref_logps[t] - logps[t]).item()
                kl = {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - d - 1}[kl_estimator]
                loss += kl_coef * kl
                counts["kl_sum"] += kl
            losses.append(weights[s].item() * loss)
            counts["tokens"] += 1
            counts["clipped_low"] += a < 0 and rho < 1 - clip_low
            counts["clipped_high"] += a > 0 and rho > 1 + clip_high
            counts["ratio_sum"] += rho
            counts["old_kl_sum"] += math.exp(logs[t]) - logs[t] - 1
        if losses:
            total += sum(losses) / (len(losses) if aggregation == "sequence" else 1)
    return total / normalizer, counts


OPTIONS = [
    {},
    {"clip_low": 0.1, "clip_high": 0.4},
    {"dual_clip": 1.5},
    {"kl_coef": 0.3, "kl_estimator": "k1"},
    {"kl_coef": 0.3, "kl_estimator": "k2"},
    {"kl_coef": 0.3, "kl_estimator": "k3"},
    {"dual_clip": 3.0, "kl_coef": 0.1, "clip_high": 0.28},
]


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("options", OPTIONS)
def test_equals_the_naive_formula_and_gradcheck(importance, aggregation, options):
    """Loss and statistics equal the formulas written out by hand; the gradient equals finite differences."""
    inputs = case()
    logps = inputs.pop("logps").requires_grad_()
    options = {**inputs, **options, "importance": importance, "aggregation": aggregation, "normalizer": 7.0}
    loss, stats = grpo_loss(logps, **options)
    expected, counts = naive(logps.detach(), **options)
    torch.testing.assert_close(loss.item(), expected)
    torch.testing.assert_close(dict(zip(GRPO_STATS, stats.tolist(), strict=True)), counts)
    assert stats.dtype == torch.float64 and not stats.requires_grad
    assert gradcheck(lambda x: grpo_loss(x, **options)[0], (logps,))


@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_the_options_reach_every_clip(importance):
    """The shared inputs exercise each clip: otherwise the test above could not fail."""
    _, stats = grpo_loss(**case(), importance=importance, dual_clip=1.5, normalizer=1.0)
    named = dict(zip(GRPO_STATS, stats.tolist(), strict=True))
    assert min(named["clipped_low"], named["clipped_high"], named["dual_clipped"], named["kl_sum"]) > 0


@pytest.mark.parametrize("advantage", [1.5, -1.5])
def test_each_clip_acts_at_its_own_bound(advantage):
    """Over a sweep of ratios, asymmetric clips and the dual clip act where the formula says, and nowhere else."""
    log_ratios = torch.linspace(-1.5, 1.5, 61, dtype=torch.float64)
    zeros, ones = torch.zeros_like(log_ratios), torch.ones_like(log_ratios)
    options = {"clip_low": 0.1, "clip_high": 0.6, "dual_clip": 2.5, "normalizer": 1.0}
    sequences = {"cu_seqlens": torch.arange(62), "mask": ones.bool(), "weights": ones}
    loss, stats = grpo_loss(log_ratios, zeros, advantage * ones, **options)
    expected, counts = naive(log_ratios, zeros, advantage * ones, **options, **sequences)
    assert loss.item() == pytest.approx(expected)
    assert dict(zip(GRPO_STATS, stats.tolist(), strict=True)) == pytest.approx(counts)


def test_normalizer_may_be_a_tensor():
    """A device scalar as normaliser gives what the float gives."""
    inputs = case()
    torch.testing.assert_close(
        grpo_loss(**inputs, normalizer=torch.tensor(4.0, dtype=torch.float64))[0],
        grpo_loss(**inputs, normalizer=4.0)[0],
    )


def test_per_row_and_per_sequence_inputs_agree():
    """Advantages and weights given per row equal those given per sequence."""
    inputs = case()
    rows = torch.repeat_interleave(torch.arange(SEQUENCES), torch.tensor(LENGTHS))
    per_row = inputs | {"advantages": inputs["advantages"][rows], "weights": inputs["weights"][rows]}
    torch.testing.assert_close(grpo_loss(**per_row, normalizer=3.0), grpo_loss(**inputs, normalizer=3.0))


def test_where_rows_and_sequences_are_equally_many():
    """With R = S (an empty and a longer response) advantages are per sequence and weights per row."""
    options = {"cu_seqlens": torch.tensor([0, 0, 2]), "normalizer": 1.0}
    zeros = torch.zeros(2, dtype=torch.float64)
    loss, _ = grpo_loss(zeros, zeros, torch.tensor([5.0, 1.0]), weights=torch.tensor([1.0, 3.0]), **options)
    assert loss.item() == -(1.0 * 1.0 + 3.0 * 1.0)


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("by", ["mask", "weight"])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_rows_that_do_not_count_cannot_poison(importance, aggregation, by, poison):
    """Masked or zero-weight rows with NaN or infinite values change neither loss, statistics nor gradient."""
    inputs = case() | {"weights": torch.ones(ROWS, dtype=torch.float64)}
    off = ~inputs["mask"]
    if by == "weight":
        inputs["weights"] = torch.where(off, 0.0, inputs["weights"])
        inputs["mask"] = torch.ones_like(off)
    options = {"importance": importance, "aggregation": aggregation, "kl_coef": 0.1, "normalizer": 5.0}

    def run(values):
        leaf = values["logps"].clone().requires_grad_()
        loss, stats = grpo_loss(**values | {"logps": leaf}, **options)
        loss.backward()
        return loss.detach(), stats, leaf.grad

    clean = run(inputs)
    for names in (["old_logps"], ["logps"], ["ref_logps"], ["logps", "old_logps", "ref_logps"]):
        dirty = inputs | {name: torch.where(off, poison, inputs[name]) for name in names}
        for got, want in zip(run(dirty), clean, strict=True):
            assert torch.equal(got, want)
    assert clean[2][off].eq(0).all()


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("name", ["logps", "old_logps", "ref_logps"])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_token_that_counts_and_is_not_finite_makes_the_loss_nan(importance, name, poison):
    """Law 12: no clamp may turn a non-finite log-prob into an ordinary step; the token is counted as `nonfinite`."""
    inputs = case()
    inputs[name][5] = poison  # unmasked, weight 2
    leaf = inputs.pop("logps").requires_grad_()
    loss, stats = grpo_loss(leaf, **inputs, importance=importance, kl_coef=0.1, normalizer=1.0)
    assert loss.isnan()
    loss.backward()
    assert leaf.grad.isnan().any()
    named = dict(zip(GRPO_STATS, stats.tolist(), strict=True))
    assert named["nonfinite"] >= 1 and all(math.isfinite(v) for v in named.values())


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_an_advantage_that_is_not_finite_makes_the_loss_so(importance, poison):
    """The loss is not finite, with and without the head: the step is then skipped, never trained on a wrong number."""
    inputs = case()
    inputs["advantages"][0] = poison
    options = {**inputs, "importance": importance, "normalizer": 1.0}
    assert not grpo_loss(**options)[0].isfinite()
    options.pop("logps")
    hidden, weight = torch.randn(ROWS, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    assert not linear_grpo_loss(hidden, weight, torch.zeros(ROWS, dtype=torch.int64), **options)[0].isfinite()


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_micro_batches_add_up(aggregation, importance):
    """Law 3: loss, gradient and statistics of any split into whole sequences sum to those of the whole."""
    whole = case()
    options = {"importance": importance, "aggregation": aggregation, "kl_coef": 0.2, "normalizer": 9.0}
    leaf = whole["logps"].clone().requires_grad_()
    loss, stats = grpo_loss(**whole | {"logps": leaf}, **options)
    loss.backward()
    for cut in range(SEQUENCES + 1):
        parts = leaf.detach().clone().requires_grad_()
        sums = [0.0, 0.0]
        for sequences in (slice(0, cut), slice(cut, SEQUENCES)):
            offsets = OFFSETS[sequences.start : sequences.stop + 1]
            rows = slice(offsets[0].item(), offsets[-1].item())
            part = {k: v[rows] for k, v in whole.items() if k in ("old_logps", "ref_logps", "mask")}
            part |= {k: whole[k][sequences] for k in ("advantages", "weights")}
            out = grpo_loss(parts[rows], **part, cu_seqlens=offsets - offsets[0], **options)
            sums = [a + b for a, b in zip(sums, out, strict=True)]
        sums[0].backward()
        torch.testing.assert_close(sums[0], loss)
        torch.testing.assert_close(sums[1], stats)
        torch.testing.assert_close(parts.grad, leaf.grad)


def test_k3_is_accurate_near_zero():
    """In fp32, k3 and its gradient keep 1e-6 relative precision where exp(d) - d - 1 has lost it."""
    for d in (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.249, 0.251, 1.0, -1e-3, -0.249, -0.251, -5.0, 19.0):
        ref = torch.tensor([d], dtype=torch.float32)
        exact_d = Fraction(ref.item())
        logps = torch.zeros(1, requires_grad=True)
        kl = torch.dot(torch.ones(1), grpo_loss_kl(logps, ref))
        kl.backward()
        exact = sum((exact_d**k / math.factorial(k) for k in range(2, 90)), Fraction(0))
        slope = sum((exact_d**k / math.factorial(k) for k in range(1, 90)), Fraction(0))
        assert kl.item() == pytest.approx(float(exact), rel=1e-6), d
        assert logps.grad.item() == pytest.approx(-float(slope), rel=1e-6), d
    naive_error = abs((torch.tensor(1e-3).exp() - 1e-3 - 1).item() / 5.0016670834e-7 - 1)
    assert naive_error > 0.01  # what the series is for


def grpo_loss_kl(logps, ref):
    """Only the k3 term of the loss."""
    zero = torch.zeros(1)
    return grpo_loss(logps, logps.detach(), zero, ref_logps=ref, kl_coef=1.0, normalizer=1.0)[0][None]


def test_log_ratio_is_clamped():
    """A log-ratio of 1000 counts as 20, in ratio and KL, without overflow."""
    loss, stats = grpo_loss(torch.tensor([0.0]), torch.tensor([-1000.0]), torch.tensor([-1.0]), normalizer=1.0)
    assert loss.item() == pytest.approx(math.exp(20), rel=1e-6) and stats.isfinite().all()
    assert losses.MAX_LOG_RATIO == 20


def test_on_policy_gradient_is_minus_advantage():
    """At ratio 1 each token's gradient is -A / normalizer: nothing is clipped and nothing halved at the tie."""
    logps = torch.full((3,), -1.0, requires_grad=True)
    grpo_loss(logps, logps.detach(), torch.tensor([1.0, -2.0, 0.0]), normalizer=4.0)[0].backward()
    torch.testing.assert_close(logps.grad, torch.tensor([-0.25, 0.5, 0.0]))


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("sequences", [0, 2])
def test_empty_batch(aggregation, sequences):
    """No rows, with or without sequences: loss 0 that can be differentiated, statistics 0."""
    logps = torch.zeros(0, requires_grad=True)
    loss, stats = grpo_loss(
        logps,
        torch.zeros(0),
        torch.zeros(sequences),
        cu_seqlens=torch.zeros(sequences + 1, dtype=torch.int32),
        aggregation=aggregation,
        normalizer=1.0,
    )
    loss.backward()
    assert loss.item() == 0 and stats.eq(0).all() and logps.grad.shape == (0,)


def test_all_rows_masked():
    """Loss 0 and gradient 0, not 0 / 0."""
    inputs = case() | {"mask": torch.zeros(ROWS, dtype=torch.bool)}
    leaf = inputs.pop("logps").requires_grad_()
    loss, stats = grpo_loss(leaf, **inputs, importance="sequence", aggregation="sequence", normalizer=1.0)
    loss.backward()
    assert loss.item() == 0 and stats.eq(0).all() and leaf.grad.eq(0).all()


def test_low_precision_log_probs_are_computed_in_fp32():
    """bf16 log-probs give an fp32 loss."""
    half = torch.tensor([-1.0, -2.0], dtype=torch.bfloat16)
    assert grpo_loss(half, half, torch.ones(2), normalizer=1.0)[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("logps", {"logps": torch.zeros(ROWS, 1)}),
        ("old_logps", {"old_logps": torch.zeros(ROWS + 1)}),
        ("old_logps", {"old_logps": torch.zeros(ROWS, device="meta")}),
        ("advantages", {"advantages": torch.zeros(SEQUENCES + 1)}),
        ("advantages", {"advantages": torch.zeros(SEQUENCES), "cu_seqlens": None}),
        ("weights", {"weights": torch.zeros(SEQUENCES + 1)}),
        ("weights", {"weights": torch.zeros(ROWS, dtype=torch.int64)}),
        ("mask", {"mask": torch.ones(ROWS)}),
        ("mask", {"mask": torch.ones(ROWS - 1, dtype=torch.bool)}),
        ("ref_logps", {"ref_logps": torch.zeros(1)}),
        ("ref_logps", {"ref_logps": None, "kl_coef": 0.1}),
        ("cu_seqlens", {"cu_seqlens": OFFSETS.float()}),
        ("cu_seqlens", {"cu_seqlens": OFFSETS[:1]}),
        ("cu_seqlens", {"cu_seqlens": None, "advantages": torch.zeros(ROWS), "importance": "sequence"}),
        ("kl_estimator", {"kl_estimator": "k4"}),
        ("importance", {"importance": "group"}),
        ("aggregation", {"aggregation": "mean"}),
        ("dual_clip", {"dual_clip": 0.5}),
        ("normalizer", {"normalizer": 0.0}),
        ("normalizer", {"normalizer": math.nan}),
    ],
)
def test_wrong_arguments_are_named(name, changes):
    """What does not fit raises ValueError whose message starts with the argument's name."""
    arguments = case() | {"weights": None, "normalizer": 1.0} | changes
    with pytest.raises(ValueError, match=f"^{name}"):
        grpo_loss(**arguments)
