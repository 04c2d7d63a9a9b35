"""Token weights: each correction's formula, what they correct, and the mask of tokens of low entropy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from rethinker.algorithm.corrections import METRICS, bounds, corrected, entropy_threshold, token_weights, weigh
from rethinker.algorithm.objective import load_loss, loss_inputs, loss_normalizer
from rethinker.config import AlgorithmConfig
from rethinker.runtime.distributed import ALONE, Ranks
from rethinker.samples import Completion, Rethought
from rethinker_kernels import GRPO_STATS, policy_loss
from rethinker_kernels.losses import Objective
from tests.algorithm.examples import packed, sample

KINDS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_mask")
TRIGGER = Rethought(2, 4, "doubt", 0, 4)  # the first answer carries no gradient, but it was sampled


def scored(gaps: list[float], rethought: Rethought | None = None, kept: list[bool] | None = None) -> Completion:
    """A response whose log(pi_trainer / pi_rollout) are the gaps, to fp32; forced tokens have NaN log-probs."""
    rollout = [-2.0 - 0.1 * i for i in range(len(gaps))]
    for i in range(rethought.trigger_start, rethought.trigger_end) if rethought else ():
        rollout[i] = math.nan
    trainer = [-2.0 - 0.1 * i + gap for i, gap in enumerate(gaps)]
    return Completion(list(range(len(gaps))), rollout, "", "stop", rethought, trainer, kept)


def by_hand(completion: Completion, kind: str, low: float | None, high: float | None) -> list[float]:
    """The formulas of the module's docstring, in fp64, one token at a time."""
    span = completion.rethought
    forced = range(span.trigger_start, span.trigger_end) if span else ()
    pairs = zip(completion.trainer_logprobs.tolist(), completion.logprobs.tolist(), strict=True)
    gaps = {i: ours - theirs for i, (ours, theirs) in enumerate(pairs) if i not in forced}
    high = high if high is not None else {"geometric_mask": 1.01}.get(kind, 2.0)
    low = low if low is not None else 0.0 if "truncate" in kind else 1 / high
    weights = []
    for i in range(completion.tokens):
        of = [gaps[i]] if kind.startswith("token") and i not in forced else list(gaps.values())
        total = sum(of) / (len(of) if kind == "geometric_mask" else 1)
        ratio = math.exp(total) if total < 700 else math.inf
        inside = low <= ratio <= high
        if i in forced:
            weights.append(1.0)
        elif "truncate" in kind:
            weights.append(min(max(ratio, low), high))
        else:
            weights.append((1.0 if kind == "geometric_mask" else ratio) if inside else 0.0)
    return weights


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("low, high", [(None, None), (0.0, 1.5), (0.5, 5.0), (None, 1.2)])
def test_each_formula_by_hand(kind, low, high):
    """Responses of 0, 1 and more tokens, with and without a forced trigger, ratios near 1, far from it, and far beyond
    what exp can hold: never inf, never a NaN."""
    config = AlgorithmConfig(rollout_correction=kind, correction_low=low, correction_high=high)
    rng, found = np.random.default_rng(0), []
    cases = [[], [0.0], [0.3], [1.0, -1.0], [900.0], [-900.0], [900.0, -900.0, 0.1], [60.0] * 20, [-60.0] * 20]
    cases += [(rng.standard_normal(int(n)) * scale).tolist() for n in (1, 5, 40) for scale in (1e-4, 0.1, 1.0)]
    for gaps, rethought in itertools.product(cases, (None, TRIGGER)):
        if rethought and len(gaps) < 4:
            continue
        one = scored(gaps, rethought)
        weights = token_weights(one, config)
        assert weights.shape == (len(gaps),) and np.isfinite(weights).all()
        assert (weights <= 1.0000001 * bounds(config)[1]).all()
        # The tokens' ratios are fp32, as the log-probs are: near 700 one step of these is 6e-5.
        assert weights.tolist() == pytest.approx(by_hand(one, kind, low, high), rel=1e-3 if kind[0] == "t" else 1e-9)
        found += weights.tolist()
    assert len(set(found)) > (2 if kind != "geometric_mask" else 1)


def test_truncation_of_an_older_release_is_the_same_to_the_bit():
    """token_truncate with high 2 and no low is what rollout_correction: 2.0 computed: min(2, exp(gap)) in fp32."""
    one = scored(np.random.default_rng(1).standard_normal(1000).tolist())
    gap = torch.tensor(one.trainer_logprobs) - torch.tensor(one.logprobs)
    for high in (None, 2.0):
        config = AlgorithmConfig(rollout_correction="token_truncate", correction_high=high)
        assert token_weights(one, config).tolist() == gap.exp().clamp(max=2.0).double().tolist()


@pytest.mark.parametrize("kind", [*KINDS, None])
@pytest.mark.parametrize("side", ["rollout", "trainer"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_log_prob_that_is_not_finite_is_no_weight(kind, side, bad):
    """Law 12: it becomes NaN, in a sequence's ratio of all sampled tokens, whatever the mask of low entropy says."""
    one = scored([0.1] * 6, TRIGGER, kept=[True, True, True, True, True, False])
    (one.logprobs if side == "rollout" else one.trainer_logprobs)[5] = bad
    weights = np.isnan(token_weights(one, AlgorithmConfig(rollout_correction=kind, top_entropy=0.5)))
    if kind is None:  # the trainer's score is not used then
        assert weights.tolist() == [False] * 5 + [side == "rollout"]
    else:
        level = [True, True, False, False, True, True] if not kind.startswith("token") else [False] * 5 + [True]
        assert weights.tolist() == level


def autoregressive(logits: torch.Tensor) -> tuple[list[tuple[int, ...]], torch.Tensor]:
    """All sequences of 3 tokens from a vocabulary of 3, and their tokens' log-probs [27, 3], from one row of logits per
    prefix [13, 3]."""
    vocabulary = range(3)
    prefixes = [p for n in range(3) for p in itertools.product(vocabulary, repeat=n)]
    rows = dict(zip(prefixes, logits.log_softmax(-1), strict=True))
    sequences = list(itertools.product(vocabulary, repeat=3))
    return sequences, torch.stack([torch.stack([rows[s[:t]][s[t]] for t in range(3)]) for s in sequences])


def gradient(policy: torch.Tensor, behaviour: torch.Tensor, config: AlgorithmConfig) -> torch.Tensor:
    """The expected gradient of the shipped loss when the wrong policy samples: the sum over all sequences."""
    leaf = policy.clone().requires_grad_()
    sequences, logps = autoregressive(leaf)
    _, rollout = autoregressive(behaviour)
    advantages = torch.tensor([math.sin(3.0 * i) for i in range(len(sequences))], dtype=torch.float64)
    weights = torch.ones_like(rollout)
    if config.rollout_correction:
        everything = torch.ones(3, dtype=torch.bool)
        gaps = zip(logps.detach() - rollout, strict=True)
        weights = torch.stack([torch.from_numpy(corrected(gap, everything, config)) for (gap,) in gaps])
    loss, _ = policy_loss(
        logps.flatten(),
        load_loss(config).function,
        logps.detach().flatten(),
        advantages,
        cu_seqlens=torch.arange(0, 3 * len(sequences) + 1, 3),
        weights=(weights * rollout.sum(1).exp()[:, None]).flatten(),
        normalizer=1.0,
    )
    loss.backward()
    return leaf.grad


def test_a_correction_corrects():
    """On a problem that can be summed up whole, sampled by a wrong policy: whole sequence ratios leave no bias in the
    gradient, tokens' ratios and bounded ones less than none at all does."""
    generator = torch.Generator().manual_seed(0)
    biases: dict[str, list[float]] = {}
    unbounded = {"correction_low": 0.0, "correction_high": 1e30}
    settings = {
        "none": {},
        "token": {"rollout_correction": "token_truncate", **unbounded},
        "token, to 2": {"rollout_correction": "token_truncate"},
        "sequence": {"rollout_correction": "sequence_truncate", **unbounded},
        "sequence, to 2": {"rollout_correction": "sequence_truncate"},
    }
    for _ in range(10):
        policy = torch.randn(13, 3, generator=generator, dtype=torch.float64)
        behaviour = policy + 0.3 * torch.randn(13, 3, generator=generator, dtype=torch.float64)
        true = gradient(policy, policy, AlgorithmConfig())
        for name, given in settings.items():
            bias = gradient(policy, behaviour, AlgorithmConfig(**given)) - true
            biases.setdefault(name, []).append(float(bias.norm() / true.norm()))
    mean = {name: sum(values) / len(values) for name, values in biases.items()}
    assert max(biases["sequence"]) < 1e-12 < 0.1 < mean["none"]
    assert mean["token"] < mean["none"] and mean["token, to 2"] < mean["none"]
    assert mean["sequence, to 2"] < 0.5 * mean["token, to 2"]


class Two(Ranks):
    """One of two ranks whose collectives know what the other says."""

    def gather(self, value):
        return [value, self.other] if self.rank == 0 else [self.other, value]


def on_two_ranks(completions: list[Completion], entropies: list[np.ndarray], config: AlgorithmConfig) -> list[dict]:
    """`weigh` on rank 0, with the first half, and on rank 1."""
    half, said = len(completions) // 2, {}
    shares = [(completions[:half], entropies[:half]), (completions[half:], entropies[half:])]
    for rank, share in enumerate(shares):
        recorder = Ranks(rank, 2, rank)
        object.__setattr__(recorder, "gather", lambda value, rank=rank: said.update({rank: value}) or [value])
        weigh(*share, config, recorder)
    found = []
    for rank, share in enumerate(shares):
        two = Two(rank, 2, rank)
        object.__setattr__(two, "other", said[1 - rank])
        found.append(weigh(*share, config, two))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_logged_is_what_was_done(kind):
    """Shares of the sampled tokens that are masked and cut, and the largest ratio, over the responses of all ranks, the
    same on every rank; null where no correction is on."""
    rng = np.random.default_rng(2)
    completions = [scored((rng.standard_normal(n) * 0.5).tolist(), TRIGGER if n > 4 else None) for n in (0, 1, 3, 6, 9)]
    config = AlgorithmConfig(rollout_correction=kind, correction_low=0.8, correction_high=1.3)
    alone = weigh(completions, [np.zeros(c.tokens) for c in completions], config, ALONE)
    assert tuple(alone) == METRICS and alone["top_entropy_threshold"] is None
    found = [w for c in completions for w, old in zip(token_weights(c, config), c.logprobs, strict=True) if old == old]
    levels = []
    for one in completions:
        gaps = (one.trainer_logprobs.astype(np.float64) - one.logprobs)[np.isfinite(one.logprobs)]
        level = gaps if kind.startswith("token") else np.full(len(gaps), gaps.sum())
        levels += np.exp(level / (max(1, len(gaps)) if kind == "geometric_mask" else 1)).tolist()
    assert len(found) == len(levels) == 0 + 1 + 3 + 4 + 7
    cut = sum(not 0.8 <= ratio <= 1.3 for ratio in levels) / len(levels)
    masks = kind.endswith("mask")
    assert alone["correction_masked"] == sum(w == 0 for w in found) / len(found) == (cut if masks else 0)
    assert alone["correction_truncated"] == (0 if masks else cut) and 0 < cut < 1
    assert alone["correction_ratio_max"] == pytest.approx(max(levels), rel=1e-6)
    entropies = [np.zeros(c.tokens, np.float32) for c in completions]
    assert on_two_ranks(completions, entropies, config) == [alone, alone]
    assert weigh([], [], config, ALONE)["correction_ratio_max"] == 0
    assert math.isfinite(weigh([scored([900.0] * 3)], [np.zeros(3)], config, ALONE)["correction_ratio_max"])
    assert set(weigh(completions, entropies, AlgorithmConfig(top_entropy=1.0), ALONE).values()) == {None, 0.0}


@pytest.mark.parametrize("share", [0.001, 0.2, 0.5, 0.77, 1.0])
def test_the_share_with_the_highest_entropy_is_kept(share):
    """ceil(share n) of the n tokens that carry a gradient, over all ranks, and ties with the last of them."""
    rng = np.random.default_rng(3)
    lengths = (7, 0, 1, 12, 30)
    completions = [scored([0.0] * n, TRIGGER if n == 12 else None) for n in lengths]
    entropies = [rng.random(n).astype(np.float32) for n in lengths]
    entropies[3][:4] = 9.0  # what carries no gradient anyway has no part in it
    everything = np.concatenate([e[4:] if n == 12 else e for n, e in zip(lengths, entropies, strict=True)])
    config, most = AlgorithmConfig(top_entropy=share), math.ceil(share * len(everything))
    metrics = weigh(completions, entropies, config, ALONE)
    assert metrics["top_entropy_threshold"] == sorted(everything)[-most]
    kept = [c.kept.tolist() for c in completions]
    assert sum(map(sum, kept)) - 4 == most and list(map(len, kept)) == list(lengths)
    ranked = [pair for c, e in zip(completions, entropies, strict=True) for pair in zip(e, c.kept, strict=True)]
    assert min(e for e, is_kept in ranked if is_kept) >= max((e for e, is_kept in ranked if not is_kept), default=0)
    assert on_two_ranks(completions, entropies, config) == [metrics, metrics]
    assert [c.kept.tolist() for c in completions] == kept
    for completion in completions:
        assert token_weights(completion, config).tolist() == completion.kept.astype(float).tolist()


def test_ties_and_entropies_that_are_not_finite_are_kept():
    """The threshold is one of the entropies; NaN has no part in it and stays, to be noticed. Without a token: none."""
    assert entropy_threshold(np.array([1.0, 2.0, 2.0, 2.0, np.nan]), 0.25) == 2.0
    assert entropy_threshold(np.zeros(0), 0.5) is None and entropy_threshold(np.array([np.nan]), 0.5) is None
    one = scored([0.0] * 5)
    weigh([one], [np.array([1.0, 2.0, 2.0, 2.0, np.nan], np.float32)], AlgorithmConfig(top_entropy=0.25), ALONE)
    assert one.kept.tolist() == [False, True, True, True, True]


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_a_masked_token_counts_in_the_mean_and_the_statistics(aggregation):
    """The indicator stands inside the mean (arXiv 2506.01939): the loss is the kept tokens' sum over what all tokens'
    would be divided by, and the metrics are those without the mask."""
    config = AlgorithmConfig(aggregation=aggregation, top_entropy=0.5)
    forced = Rethought(2, 4, "x", 2, 4)
    samples = [sample(1.0, length=4), sample(-0.5, length=6, rethought=forced), sample(0.7, length=1)]
    batch, normalizer = packed(samples), loss_normalizer(samples, config, 8)
    kept = torch.tensor([True, False, False, True] + [False] * 6 + [True])
    noise = torch.randn(11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logps = batch.old_logps.nan_to_num(-1.0) + 0.3 * noise
    whole = policy_loss(logps, **_without_nll(loss_inputs(load_loss(config), batch, config, normalizer)))
    batch.weights = batch.weights * kept
    found = policy_loss(logps, **_without_nll(loss_inputs(load_loss(config), batch, config, normalizer)))
    torch.testing.assert_close(found[1], whole[1], rtol=0, atol=0)
    assert found[1][GRPO_STATS.index("tokens")] == 9
    expected = 0.0
    for s, tokens in enumerate(((0, 1, 2, 3), (4, 5, 8, 9), (10,))):
        advantage, terms = samples[s].advantage, []
        for i in tokens:
            ratio = math.exp(logps[i] - batch.old_logps[i])
            clipped = min(max(ratio, 0.8), 1.2)
            terms.append(-min(ratio * advantage, clipped * advantage) if kept[i] else 0.0)
        expected += sum(terms) / (len(tokens) if aggregation == "sequence" else 1)
    assert found[0].item() == pytest.approx(expected / {"token": 9, "sequence": 3, "constant": 24}[aggregation])
    assert found[0].item() != pytest.approx(whole[0].item(), rel=1e-3)
    # The head makes gradients from slopes, not from the loss: the same ones.
    leaf = logps.clone().requires_grad_()
    inputs = _without_nll(loss_inputs(load_loss(config), batch, config, normalizer))
    policy_loss(leaf, **inputs)[0].backward()
    slopes = Objective(like=logps, **inputs).slopes(logps)
    torch.testing.assert_close(slopes, leaf.grad)
    assert slopes[kept].any() and not slopes[~kept].any()


def _without_nll(inputs: dict) -> dict:
    return {name: value for name, value in inputs.items() if name != "nll_weights"}
