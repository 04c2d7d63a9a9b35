"""linear_policy_loss: its composition, the fast path of GRPO against the open path, and losses that are not GRPO's."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from torch.autograd import gradcheck

from rethinker_kernels import (
    LINEAR_GRPO_STATS,
    grpo_loss,
    linear,
    linear_grpo_loss,
    linear_policy_loss,
    linear_selective_log_softmax,
    policy_loss,
)
from rethinker_kernels.losses import NeedsSequences, Surrogate, grpo
from tests.kernels.test_losses import LENGTHS, OFFSETS, ROWS, SEQUENCES, case


def cispo(logps, rows):
    return -(logps.detach() - rows.old_logps).exp().clamp(max=1.3) * rows.advantages * logps


def gmpo(logps, rows):
    """One geometric mean of clipped ratios per response."""
    return -rows.sequence_mean((logps - rows.old_logps).clamp(-0.4, 0.4)).exp() * rows.advantages


def renamed_grpo(logps, rows, **options):
    """GRPO as a user's own function: the op cannot know it."""
    return grpo(logps, rows, **options)


def head(dtype=torch.float64, vocabulary: int = 6, width: int = 3) -> tuple[list[torch.Tensor], torch.Tensor]:
    """hidden, weight and bias, and tokens."""
    g = torch.Generator().manual_seed(1)
    sizes = ((ROWS, width), (vocabulary, width), (vocabulary,))
    leaves = [torch.randn(*s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in sizes]
    return leaves, torch.randint(vocabulary, (ROWS,), generator=g)


def rows_of(dtype=torch.float64) -> dict[str, torch.Tensor]:
    """`case` without its log-probs, in the type of results."""
    return {
        name: value.to(torch.promote_types(dtype, torch.float32)) if value.is_floating_point() else value
        for name, value in case().items()
        if name != "logps"
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", [cispo, gmpo])
@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_any_loss_is_its_composition(loss, aggregation, dtype, monkeypatch):
    """Loss, statistics and gradients are autograd's over log-probs and policy_loss, across chunks, with a supervised
    term, and for a loss that needs whole responses."""
    monkeypatch.setattr(linear, "chunk_rows", lambda *_: (3, 4))
    leaves, index = head(dtype)
    given = rows_of(dtype) | {"aggregation": aggregation, "normalizer": 6.0, "whole_sequences": loss is gmpo}
    nll_weights = 0.1 * (torch.arange(ROWS) % 3).to(given["old_logps"].dtype)
    options = {"bias": leaves[2], "temperature": 0.9}
    value, logps, stats = linear_policy_loss(*leaves[:2], index, loss, **options, **given, nll_weights=nll_weights)
    want_logps = linear_selective_log_softmax(*leaves[:2], index, **options)
    want, want_stats = policy_loss(want_logps, loss, **given)
    want = want - (nll_weights * want_logps).sum()
    tolerance = {} if dtype != torch.bfloat16 else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close((value, logps), (want, want_logps.detach()))
    torch.testing.assert_close(stats[:-1], want_stats)
    gradients = torch.autograd.grad(value, leaves), torch.autograd.grad(want, leaves)
    torch.testing.assert_close(*gradients, **tolerance)
    assert all(gradient.dtype == dtype and gradient.any() for gradient in gradients[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("seed", range(3))
def test_grpo_by_name_is_grpo_as_any_function(importance, aggregation, dtype, seed, monkeypatch):
    """GRPO with random options, named and as a function that the op does not know: the same loss, log-probs, gradients
    and statistics (clip fractions, KL, entropy) to the type's precision. fuzz_triton.py has the same for its kernel."""
    monkeypatch.setattr(linear, "chunk_rows", lambda *_: (3, 4))
    g = torch.Generator().manual_seed(seed)
    low, high, dual = (0.05 + 0.5 * torch.rand(3, generator=g)).tolist()
    options = {"clip_low": low, "clip_high": high, "importance": importance, "kl_coef": [0.0, 0.2, 0.2][seed]}
    options |= {"dual_clip": [None, 1 + dual, 3.0][seed], "kl_estimator": f"k{seed + 1}"}
    given = rows_of(dtype) | {"aggregation": aggregation, "normalizer": 5.0}
    results = []
    for loss, more in ((grpo, {}), (renamed_grpo, {"whole_sequences": importance == "sequence"})):
        leaves, index = head(dtype)
        more["surrogate"] = Surrogate(**options)
        value, logps, stats = linear_policy_loss(*leaves[:2], index, partial(loss, **options), **given, **more)
        results.append((value, logps, stats, *torch.autograd.grad(value, leaves[:2])))
    torch.testing.assert_close(*results, atol=1e-12 if dtype == torch.float64 else 1e-6, rtol=1e-6)
    named = dict(zip(LINEAR_GRPO_STATS, results[0][2].tolist(), strict=True))
    assert named["clipped_low"] + named["clipped_high"] > 0 and named["entropy_sum"] > 0


def bonus(leaves: list[torch.Tensor], inputs: dict, aggregation: str, temperature: float) -> torch.Tensor:
    """The entropies [R] of a head by their formula, added up token by token as `naive` adds up a loss."""
    hidden, weight, bias = leaves
    logits = (hidden.double() @ weight.double().T + bias.double()) / temperature
    p = (logits - logits.amax(1, keepdim=True)).exp()
    p = p / p.sum(1, keepdim=True)
    entropies, total, starts = -(p * p.log()).sum(1), torch.zeros((), dtype=torch.float64), OFFSETS.tolist()
    for s, (start, end) in enumerate(itertools.pairwise(starts)):
        counted = [t for t in range(start, end) if inputs["mask"][t] and inputs["weights"][s] != 0]
        parts = [inputs["weights"][s].double() * entropies[t] for t in counted]
        total = total + sum(parts) / (len(parts) if aggregation == "sequence" and parts else 1)
    return total


TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}
"""Of gradients against fp64 formulas."""


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", [grpo, cispo, gmpo])
@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_the_entropy_bonus_is_its_formula(loss, aggregation, dtype, monkeypatch):
    """With entropy_coef the loss and its gradients differ by -entropy_coef times the entropies written out in fp64,
    whose mask, weights, aggregation and normalizer are the loss's; across chunks, of a tempered distribution, with a
    bias and a supervised term. Log-probs and statistics stay."""
    monkeypatch.setattr(linear, "chunk_rows", lambda *_: (3, 4))
    inputs = rows_of(dtype)
    nll_weights = 0.1 * (torch.arange(ROWS) % 3).to(inputs["old_logps"].dtype)
    given = inputs | {"aggregation": aggregation, "normalizer": 6.0, "whole_sequences": loss is gmpo}
    given["temperature"] = 0.6
    leaves, index = head(dtype)
    results = []
    for coefficient in (0.0, 0.3):
        more = {"bias": leaves[2], "nll_weights": nll_weights, "entropy_coef": coefficient}
        results.append(linear_policy_loss(*leaves[:2], index, loss, **more, **given))
    (plain, *rest), (value, *same) = results
    assert all(map(torch.equal, rest, same))
    want = -0.3 / 6 * bonus(leaves, inputs, aggregation, 0.6)
    torch.testing.assert_close((value - plain).double(), want, atol=1e-12 if dtype == torch.float64 else 1e-6, rtol=0)
    gradients = [torch.autograd.grad(x, leaves) for x in (value, plain, want)]
    tolerance = TOLERANCES[dtype]
    for got, without, expected in zip(*gradients, strict=True):
        torch.testing.assert_close((got.double() - without.double()), expected.double(), atol=tolerance, rtol=tolerance)
        assert expected.norm() > 1e-2
    if dtype == torch.float64 and loss is not cispo:  # whose slope is no difference: it detaches the ratio
        more |= {"loss": loss, "index": index}
        assert gradcheck(lambda h, w, b: linear_policy_loss(h, w, **more | {"bias": b}, **given)[0], leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", [grpo, cispo, gmpo])
@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_a_soft_cap_is_its_formula(loss, dtype, softcap, monkeypatch):
    """Loss, log-probs, entropies and gradients of hidden, weight and bias are those that autograd makes in fp64 of
    softcap * tanh(logits / softcap), across chunks, of a tempered distribution, with an entropy bonus and a supervised
    term; 0.5 is far below these logits. Exponentials in place of logits are not taken where there are any."""
    monkeypatch.setattr(linear, "chunk_rows", lambda *_: (3, 4))
    monkeypatch.setattr(linear, "takes_exponentials", lambda *_: True)
    leaves, index = head(dtype)
    given = rows_of(dtype) | {"normalizer": 6.0, "whole_sequences": loss is gmpo, "entropy_coef": 0.3}
    nll_weights = 0.1 * (torch.arange(ROWS) % 3).to(given["old_logps"].dtype)
    options = {"bias": leaves[2], "temperature": 0.6, "softcap": softcap}
    got = linear_policy_loss(*leaves[:2], index, loss, **options, **given, nll_weights=nll_weights)

    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    logits = exact[0] @ exact[1].T + exact[2]
    log_p = (softcap * (2 / (1 + (-2 * logits / softcap).exp()) - 1) / 0.6).log_softmax(1)
    logps, entropies = log_p[torch.arange(ROWS), index], -(log_p.exp() * log_p).sum(1)
    widened = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in given.items()}
    want = policy_loss(logps, loss, entropies=entropies, **widened)[0] - (nll_weights.double() * logps).sum()
    counted = given["mask"] & (given["weights"].repeat_interleave(torch.tensor(LENGTHS)) != 0)
    close = partial(torch.testing.assert_close, atol=1e-12 if dtype == torch.float64 else 2e-6, rtol=1e-6)
    close((got[0].double(), got[1].double()), (want, logps.detach()))
    close(got[2][-1], entropies.detach()[counted].sum())
    tolerance = TOLERANCES[dtype]
    for a, b in zip(torch.autograd.grad(got[0], leaves), torch.autograd.grad(want, exact), strict=True):
        torch.testing.assert_close(a.double(), b, atol=tolerance, rtol=tolerance)
        assert b.norm() > 1e-2


@pytest.mark.parametrize("loss", [grpo, cispo, gmpo])
def test_a_bonus_is_that_of_entropies_that_are_given(loss, monkeypatch):
    """policy_loss takes the entropies, and their gradient through it gives the op's; those of tokens that do not count
    may be NaN. Without them, or with others than one number a token, it names what is missing."""
    monkeypatch.setattr(linear, "chunk_rows", lambda *_: (3, 4))
    leaves, index = head()
    given = rows_of() | {"normalizer": 6.0, "whole_sequences": loss is gmpo, "entropy_coef": 0.2}
    value, *_ = linear_policy_loss(*leaves[:2], index, loss, **given)
    logps, entropies = linear_selective_log_softmax(*leaves[:2], index, return_entropy=True)
    masked = torch.where(given["mask"], entropies, math.nan)
    composed, _ = policy_loss(logps, loss, entropies=masked, **given)
    torch.testing.assert_close(composed, value)
    torch.testing.assert_close(*(torch.autograd.grad(x, leaves[:2]) for x in (composed, value)))
    with pytest.raises(ValueError, match="^entropies is needed"):
        policy_loss(logps, loss, **given)
    with pytest.raises(ValueError, match="^entropies: must be floating"):
        policy_loss(logps, loss, entropies=entropies[1:], **given)
    with pytest.raises(ValueError, match=r"^entropy_coef=nan: must be finite"):
        policy_loss(logps, loss, entropies=entropies, **given | {"entropy_coef": math.nan})


@pytest.mark.parametrize("entropy_coef", [0.0, 0.4])
@pytest.mark.parametrize("loss", [cispo, gmpo])
def test_micro_batches_add_up(loss, entropy_coef, monkeypatch):
    """Law 3 for any loss: the losses, statistics and gradients of any split into whole sequences, in any order, sum to
    those of the whole; with an entropy bonus, too."""
    monkeypatch.setattr(linear, "chunk_rows", lambda *_: (2, 4))
    leaves, index = head()
    inputs = rows_of()
    options = {"normalizer": 9.0, "whole_sequences": loss is gmpo, "entropy_coef": entropy_coef}
    whole = linear_policy_loss(*leaves[:2], index, loss, **inputs, **options)
    want = torch.autograd.grad(whole[0], leaves[:2])
    starts = OFFSETS.tolist()
    for split in ([[4], [1, 3], [0, 2]], [[3, 2], [4, 0, 1]]):
        total, stats = torch.zeros((), dtype=torch.float64), 0.0
        for sequences in split:
            rows = torch.cat([torch.arange(starts[s], starts[s + 1]) for s in sequences])
            part = {name: inputs[name][rows] for name in ("old_logps", "ref_logps", "mask")}
            part |= {name: inputs[name][sequences] for name in ("advantages", "weights")}
            part["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(LENGTHS[s] for s in sequences)])
            found = linear_policy_loss(leaves[0][rows], leaves[1], index[rows], loss, **part, **options)
            total, stats = total + found[0], stats + found[2]
        torch.testing.assert_close((total, stats), (whole[0], whole[2]))
        torch.testing.assert_close(torch.autograd.grad(total, leaves[:2]), want)


@pytest.mark.parametrize("entropy_coef", [0.0, 0.4])
@pytest.mark.parametrize("loss", [cispo, gmpo])
def test_a_frozen_head_costs_no_product(loss, entropy_coef, monkeypatch):
    """Only the gradients that are needed are made: two products of a chunk with a frozen head, none under no_grad."""
    leaves, index = head()
    made = []
    plain = linear.product
    monkeypatch.setattr(linear, "product", lambda a, b, **given: (made.append(a.shape), plain(a, b, **given)))
    given = rows_of() | {"normalizer": 2.0, "whole_sequences": loss is gmpo, "entropy_coef": entropy_coef}
    value, *_ = linear_policy_loss(leaves[0], leaves[1].detach(), index, loss, **given)
    value.backward()
    assert leaves[0].grad.any() and len(made) == 1 + (loss is gmpo)  # logits alone; hidden's gradient is torch.mm
    made.clear()
    with torch.no_grad():
        again, *_ = linear_policy_loss(leaves[0], leaves[1], index, loss, **given)
    assert again == value and len(made) == 1 and not again.requires_grad


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_any_loss_never_holds_all_logits(entropy_coef, monkeypatch):
    """Memory law: the largest allocation of an open loss's step, with an entropy bonus or without, is one chunk's
    logits, of 1/8 of [R, V]."""
    rows, width, vocabulary = 512, 4, 64
    monkeypatch.setattr(linear, "chunk_rows", lambda *_: (64, 64))
    hidden, weight = torch.randn(rows, width, requires_grad=True), torch.randn(vocabulary, width, requires_grad=True)
    index, old, advantages = torch.randint(vocabulary, (rows,)), -4 * torch.rand(rows), torch.randn(rows)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        given = {"normalizer": 1.0, "entropy_coef": entropy_coef}
        linear_policy_loss(hidden, weight, index, cispo, old, advantages, **given)[0].backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest <= 64 * vocabulary * 4 < 4 * rows * vocabulary / 4


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_no_loss_hides_a_broken_log_prob(poison):
    """Law 12 for any loss: CISPO's clamp would make an infinite ratio an ordinary one; masked rows do not count."""
    leaves, index = head()
    given = rows_of() | {"normalizer": 1.0}
    for row, broken in ((5, True), (1, False)):  # the second is masked
        given["old_logps"] = rows_of()["old_logps"]
        given["old_logps"][row] = poison
        value, *_ = linear_policy_loss(*leaves[:2], index, cispo, **given)
        assert value.isnan() == broken
        assert any(gradient.isnan().any() for gradient in torch.autograd.grad(value, leaves[:2])) == broken


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda logps, rows: logps.sum(), "loss: must return a number per token, floating .4., not float64 .."),
        (lambda logps, rows: logps[:, None], "loss: must return"),
        (lambda logps, rows: 0.0, "loss: must return .* not float"),
        (lambda logps, rows: logps > 0, "loss: must return .* not bool"),
        (lambda logps, rows: logps.detach() * rows.advantages, "loss: .* no gradient"),
        (gmpo, "loss: sequence_mean needs whole_sequences=True"),
    ],
)
def test_a_wrong_loss_is_named(loss, message, monkeypatch):
    """What a loss returns must be a differentiable number per token of the chunk."""
    monkeypatch.setattr(linear, "chunk_rows", lambda *_: (4, 4))
    leaves, index = head()
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        linear_policy_loss(*leaves[:2], index, loss, **rows_of(), normalizer=1.0)
    assert isinstance(caught.value, NeedsSequences) == (loss is gmpo)


@pytest.mark.parametrize("supervised", [False, True])
@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_linear_loss_is_the_composition(importance, supervised, monkeypatch):
    """linear_grpo_loss equals its lines in every output and gradient; entropy_sum is of the rows that count, and the
    supervised term of all rows with a weight, masked or not."""
    monkeypatch.setattr(linear, "chunk_rows", lambda *_: (3, 4))
    inputs = case()
    inputs.pop("logps")
    torch.manual_seed(1)
    leaves = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((ROWS, 3), (6, 3), (6,))]
    index = torch.randint(6, (ROWS,))
    options = {"importance": importance, "kl_coef": 0.1, "dual_clip": 3.0, "normalizer": 6.0, **inputs}

    nll_weights = 0.1 * (torch.arange(ROWS) % 3).double() if supervised else None
    fused = {"temperature": 0.9, "nll_weights": nll_weights, **options}
    loss, logps, stats = linear_grpo_loss(*leaves[:2], index, bias=leaves[2], **fused)
    want_logps, entropy = linear_selective_log_softmax(
        *leaves[:2], index, bias=leaves[2], temperature=0.9, return_entropy=True
    )
    want_loss, want_stats = grpo_loss(want_logps, **options)
    if supervised:
        want_loss = want_loss - (nll_weights * want_logps).sum()
        assert nll_weights[~inputs["mask"]].any()
    named = dict(zip(LINEAR_GRPO_STATS, stats.tolist(), strict=True))
    rows = torch.repeat_interleave(torch.arange(SEQUENCES), torch.tensor(LENGTHS))
    counted = inputs["mask"] & (inputs["weights"][rows] != 0)
    torch.testing.assert_close((loss, logps), (want_loss, want_logps.detach()))
    assert stats[:-1].tolist() == want_stats.tolist() and not logps.requires_grad
    assert named["entropy_sum"] == pytest.approx(entropy[counted].sum().item())
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(want_loss, leaves))
    assert gradcheck(lambda h, w, b: linear_grpo_loss(h, w, index, bias=b, **fused)[0], leaves)


def test_wrong_supervised_weights_are_named():
    """nll_weights of another length or type raise ValueError naming them."""
    inputs = case()
    rows = inputs.pop("logps")
    for wrong in (torch.ones(ROWS - 1), torch.ones(ROWS, dtype=torch.int64)):
        with pytest.raises(ValueError, match="^nll_weights"):
            linear_grpo_loss(
                rows[:, None], rows[:6, None], inputs["mask"].long(), **inputs, nll_weights=wrong, normalizer=1
            )
