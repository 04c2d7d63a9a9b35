"""A policy loss is a function of log-probs, `loss(logps, rows) -> [C]`: GRPO's is here, and what adds a loss up.

What a function does not decide lies around it, in one place: which tokens count, their weights, the aggregation, the
normalizer, the statistics. `grpo` is the definition of the shipped loss; the Triton row kernel is tested against it.

Legend: R rows (response tokens), C rows of a chunk of them, S sequences (responses).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from rethinker_kernels.arguments import check, check_choice, check_offsets, describe, wide

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-this: exp(20) is already far outside any clip range, and fp32 sums of it stay finite."""

GRPO_STATS: tuple[str, ...] = (
    "tokens",  # tokens that count: unmasked, with a non-zero weight
    "nonfinite",  # of these, tokens whose log-prob, now, then or of the reference, is not finite
    "clipped_low",  # finite tokens with A < 0 whose ratio fell below 1 - clip_low
    "clipped_high",  # finite tokens with A > 0 whose ratio rose above 1 + clip_high
    "dual_clipped",  # finite tokens with A < 0 whose ratio rose above dual_clip
    "ratio_sum",  # importance ratio
    "old_kl_sum",  # k3 estimate of KL(behaviour || policy)
    "kl_sum",  # chosen estimate of KL(policy || reference); 0 without one
)
"""Fields of a loss's statistics, in order. All are sums over finite tokens: they add over batches and ranks. They mean
the same for every loss: where GRPO's clips act, whether or not the loss clips there."""

LINEAR_GRPO_STATS: tuple[str, ...] = (*GRPO_STATS, "entropy_sum")
"""Fields of the statistics of the ops that compute the log-probs, in order."""


class LossError(ValueError):
    """The caller's loss fails, or does not return a number per token with a gradient."""


class NeedsSequences(LossError):
    """A loss asked for `Rows.sequence_mean` where only a part of the rows is known."""


@dataclass(frozen=True)
class Rows:
    """What a loss may know of C tokens beside their log-probs. Nothing here is differentiated.

    A token that does not count (`mask` False) has log-probs and advantage 0, and what a loss says of it is dropped.
    """

    old_logps: Tensor
    """[C] log-probs under the behaviour policy, which sampled the tokens."""
    advantages: Tensor
    """[C] the advantage of each token's response."""
    ref_logps: Tensor | None
    """[C] log-probs under the reference policy; None where none is loaded (kl_coef = 0)."""
    mask: Tensor
    """[C] bool: whether the token counts, which is unmasked and of a weight that is not 0."""
    weights: Tensor
    """[C] factor of the token's loss, 0 where it does not count. It is applied to what the loss returns."""
    sequence: Tensor | None = None
    """[C] int64: the response of each token, from 0 to S - 1; None where the caller named no sequences."""
    tokens: Tensor | None = None
    """[C] how many tokens of its response count, at least 1; None like `sequence`."""
    sequences: int | None = None
    """S if these are all rows of the batch; None in a chunk, which may hold parts of responses."""

    def sequence_mean(self, values: Tensor) -> Tensor:
        """[C]: for each token that counts the mean of `values` [C] over those of its response, else 0.

        A loss that calls this needs the log-probs of whole responses (`whole_sequences`).
        """
        if self.sequence is None or self.sequences is None:
            raise NeedsSequences("loss: sequence_mean needs whole_sequences=True, and cu_seqlens")
        return torch.where(self.mask, self.sequence_means(values).gather(0, self.sequence), 0.0)

    def sequence_means(self, values: Tensor) -> Tensor:
        """[S]: mean of `values` [C] over each sequence's rows that count; 0 where there are none."""
        count = segment_sum(self.mask.to(values.dtype), self.sequence, self.sequences)
        return segment_sum(torch.where(self.mask, values, 0.0), self.sequence, self.sequences) / count.clamp(min=1)

    def at(self, rows: slice) -> Rows:
        """These rows alone."""
        parts = {name: value[rows] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Rows(**{"ref_logps": None} | parts)


Loss = Callable[[Tensor, Rows], Tensor]


@dataclass(frozen=True)
class Surrogate:
    """Options of `grpo`, which are explained there. The statistics of every loss read them too."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    kl_coef: float = 0.0
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    importance: Literal["token", "sequence"] = "token"

    def __post_init__(self) -> None:
        check_choice("kl_estimator", self.kl_estimator, "k1", "k2", "k3")
        check_choice("importance", self.importance, "token", "sequence")
        for name in ("clip_low", "clip_high"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 0")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip={self.dual_clip}: must be above 1, or None")


SURROGATE_OPTIONS = tuple(field.name for field in fields(Surrogate))


def grpo(
    logps: Tensor,
    rows: Rows,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    importance: str = "token",
) -> Tensor:
    """GRPO's clipped surrogate with an optional KL term (arXiv 2402.03300, equation 3), per token [C].

        ratio = (logps - old_logps).exp()
        loss = -torch.minimum(ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A) + kl_coef * kl

    Args:
        logps: [C] log-probs of the policy.
        rows: what is known of the tokens.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high]; apart as in DAPO (2503.14476).
        dual_clip: bound > 1 on the ratio of negative advantages (1912.09729), or None.
        kl_coef: weight of the KL to the reference; above 0 `rows.ref_logps` is needed.
        kl_estimator: with d = ref_logps - logps, k1 = -d, k2 = d^2 / 2, k3 = exp(d) - d - 1.
        importance: one ratio per `token`, or per `sequence`: exp(mean over the response) (GSPO, 2507.18071).
    """
    options = Surrogate(clip_low, clip_high, dual_clip, kl_coef, kl_estimator, importance)
    ratio = importance_ratio(logps, rows, importance)
    low, high, dual = clips(ratio, rows.advantages, options)
    bounded = torch.where(low, 1 - clip_low, torch.where(high, 1 + clip_high, ratio))
    if dual_clip is not None:
        bounded = torch.where(dual, dual_clip, bounded)
    loss = -bounded * rows.advantages
    if kl_coef != 0:
        loss = loss + kl_coef * kl_estimate(logps, rows.ref_logps, kl_estimator)
    return loss


def importance_ratio(logps: Tensor, rows: Rows, importance: str) -> Tensor:
    """[C] pi / pi_behaviour, of each token or of its response."""
    difference = logps - rows.old_logps
    if importance == "sequence":
        difference = rows.sequence_mean(difference)
    return clamp_log_ratio(difference).exp()


def clips(ratio: Tensor, advantages: Tensor, options: Surrogate) -> tuple[Tensor, Tensor, Tensor]:
    """[C] bool each: where the lower, the upper and the dual clip act."""
    low = (advantages < 0) & (ratio < 1 - options.clip_low)
    high = (advantages > 0) & (ratio > 1 + options.clip_high)
    if options.dual_clip is None:
        return low, high, torch.zeros_like(low)
    return low, high, (advantages < 0) & (ratio > options.dual_clip)


def clamp_log_ratio(log_ratio: Tensor) -> Tensor:
    """Within +-MAX_LOG_RATIO; infinities become NaN, in value and gradient, so that no clamp hides them."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO) + (log_ratio - log_ratio)


def kl_estimate(logps: Tensor, ref_logps: Tensor, estimator: str) -> Tensor:
    """[C] KL(policy || reference)."""
    d = clamp_log_ratio(ref_logps - logps)
    if estimator == "k1":
        return -d
    return d.square() / 2 if estimator == "k2" else exp_minus_linear(d)


def exp_minus_linear(d: Tensor) -> Tensor:
    """exp(d) - d - 1 to full relative precision: its Taylor series near 0, where the subtraction cancels."""
    near = d.abs() < 0.25
    x = torch.where(near, d, 0.0)
    series = torch.ones_like(x)
    for k in range(14, 2, -1):  # 1 + x/3 (1 + x/4 (1 + ... x/14)): enough for fp64, derivative included
        series = 1 + x / k * series
    far = torch.where(near, 1.0, d)
    return torch.where(near, x * x / 2 * series, far.expm1() - far)


# Around a loss


class Objective:
    """A loss with all that decides how its tokens add up to one number."""

    def __init__(
        self,
        loss: Loss,
        like: Tensor,
        old_logps: Tensor,
        advantages: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        ref_logps: Tensor | None = None,
        weights: Tensor | None = None,
        mask: Tensor | None = None,
        aggregation: Literal["token", "sequence", "constant"] = "token",
        normalizer: float | Tensor,
        surrogate: Surrogate | None = None,
        whole_sequences: bool = False,
        count_weightless: bool = False,
        entropy_coef: float = 0.0,
    ) -> None:
        """`like` is [R], of the rows' number, type and device; the rest is explained in `policy_loss`."""
        self.loss, self.aggregation, self.entropy_coef = loss, aggregation, entropy_coef
        self.is_grpo = getattr(loss, "func", loss) is grpo
        given = getattr(loss, "keywords", {}) if self.is_grpo else {}
        self.surrogate = Surrogate(**given) if self.is_grpo else surrogate or Surrogate()
        self.whole_sequences = self.surrogate.importance == "sequence" if self.is_grpo else whole_sequences
        check("logps", like, (like.numel(),))
        check("old_logps", old_logps, like.shape, like=like)
        check_choice("aggregation", aggregation, "token", "sequence", "constant")
        if isinstance(normalizer, Tensor):
            if normalizer.numel() != 1 or normalizer.device != like.device:
                where = f"{describe(normalizer)} on {normalizer.device}"
                raise ValueError(f"normalizer: must be one number on {like.device}, not {where}")
        elif not normalizer > 0:
            raise ValueError(f"normalizer={normalizer}: must be positive")
        if not math.isfinite(entropy_coef):
            raise ValueError(f"entropy_coef={entropy_coef}: must be finite")
        if ref_logps is not None:
            check("ref_logps", ref_logps, like.shape, like=like)
        elif self.surrogate.kl_coef != 0:
            raise ValueError("ref_logps is needed with a kl_coef that is not 0")
        sequence = sequences = None
        per_sequence = []
        if cu_seqlens is not None:
            check_offsets("cu_seqlens", cu_seqlens, like)
            sequence, sequences = sequence_of_row(cu_seqlens, like), cu_seqlens.numel() - 1
            per_sequence = [(sequences,)]
        elif self.whole_sequences or aggregation == "sequence":
            raise ValueError("cu_seqlens is needed with a loss or an aggregation per sequence")
        if mask is not None:
            check("mask", mask, like.shape, like=like, dtypes=(torch.bool,))
        dtype = wide(like)

        def per_row(name: str, values: Tensor, rows_first: bool) -> Tensor:
            check(name, values, like.shape, *per_sequence, like=like)
            is_per_row = values.shape not in per_sequence or (rows_first and values.shape == like.shape)
            return values.detach().to(dtype)[... if is_per_row else sequence]

        active = torch.ones_like(like, dtype=torch.bool) if mask is None else mask
        factors = torch.ones_like(like, dtype=dtype) if weights is None else per_row("weights", weights, True)

        def rows_of(counts: Tensor) -> Rows:
            # Rows that do not count become harmless before any arithmetic: a 0 gradient times NaN would still be NaN.
            def counted(values: Tensor) -> Tensor:
                return torch.where(counts, values.detach().to(dtype), 0.0)

            tokens = None
            if sequence is not None:
                tokens = segment_sum(counts.to(dtype), sequence, sequences).clamp(min=1)[sequence]
            return Rows(
                old_logps=counted(old_logps),
                advantages=counted(per_row("advantages", advantages, False)),
                ref_logps=None if ref_logps is None else counted(ref_logps),
                mask=counts,
                weights=counted(factors),
                sequence=sequence,
                tokens=tokens,
                sequences=sequences,
            )

        self.rows = rows_of(active & (factors != 0))
        self.measured = rows_of(active) if count_weightless else self.rows
        """The rows that the statistics and a sequence's mean count."""
        self.normalizer = normalizer.detach() if isinstance(normalizer, Tensor) else normalizer
        factors = self.rows.weights
        self.factors = (factors / self.measured.tokens if aggregation == "sequence" else factors) / self.normalizer
        """[R]: what each row's loss is multiplied by in the sum."""

    def per_token(self, logps: Tensor, rows: Rows) -> Tensor:
        """[C]: the loss of these rows; NaN where a token counts and its log-prob is not finite, whatever the loss."""
        logps = torch.where(rows.mask, logps.to(rows.weights.dtype), 0.0)
        try:
            found = self.loss(logps, rows)
        except (LossError, torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except (Exception, SystemExit) as error:  # the caller's code raises anything
            raise LossError(f"loss: it raises {type(error).__name__}: {error}") from error
        if not isinstance(found, Tensor) or found.shape != logps.shape or not found.is_floating_point():
            got = describe(found) if isinstance(found, Tensor) else type(found).__name__
            raise LossError(f"loss: must return a number per token, floating {list(logps.shape)}, not {got}")
        if logps.requires_grad and not found.requires_grad:
            raise LossError("loss: what it returns has no gradient; compute it from logps, without detach()")
        difference = (logps - rows.old_logps).detach()
        return torch.where(rows.mask, found + (difference - difference), 0.0)

    def total(self, logps: Tensor, entropies: Tensor | None = None) -> Tensor:
        """The scalar loss of all rows; the entropies [R] are needed with an entropy_coef that is not 0."""
        token_loss = self.per_token(logps, self.rows)
        if self.entropy_coef != 0:
            token_loss = token_loss - self.entropy_coef * torch.where(self.rows.mask, entropies, 0.0)
        token_loss = token_loss * self.rows.weights
        if self.aggregation == "sequence":
            token_loss = self.measured.sequence_means(token_loss)
        return token_loss.sum() / self.normalizer

    def slopes(self, logps: Tensor, rows: slice = slice(None)) -> Tensor:
        """[C]: d total / d logps of these rows, from autograd on vectors of this size."""
        at, factors = (self.rows, self.factors) if self.whole_sequences else (self.rows.at(rows), self.factors[rows])
        with torch.enable_grad():
            leaf = logps.detach().requires_grad_()
            per_token = self.per_token(leaf, at)
            upstream = factors if self.whole_sequences else torch.ones_like(per_token)
            (slope,) = torch.autograd.grad(per_token, leaf, upstream)
        if not self.whole_sequences:
            slope = slope * factors
        difference = torch.where(at.mask, logps, 0.0) - at.old_logps
        return torch.where(at.mask, slope + (difference - difference), 0.0)

    def entropy_slopes(self, rows: slice = slice(None)) -> Tensor | None:
        """[C]: d total / d entropies of these rows; None where there is no bonus."""
        return -self.entropy_coef * self.factors[rows] if self.entropy_coef != 0 else None

    def statistics(self, logps: Tensor) -> Tensor:
        """[len(GRPO_STATS)] fp64."""
        rows, options = self.measured, self.surrogate
        logps = torch.where(rows.mask, logps.detach().to(rows.weights.dtype), 0.0)
        ratio = importance_ratio(logps, rows, options.importance)
        low, high, dual = clips(ratio, rows.advantages, options)
        old_kl = exp_minus_linear(clamp_log_ratio(logps - rows.old_logps))
        kl = torch.zeros_like(logps)
        if rows.ref_logps is not None:
            kl = kl_estimate(logps, rows.ref_logps, options.kl_estimator)
        finite = rows.mask & ratio.isfinite() & kl.isfinite()
        values = {
            "tokens": rows.mask,
            "nonfinite": rows.mask & ~finite,
            "clipped_low": low & finite,
            "clipped_high": high & finite,
            "dual_clipped": dual & finite,
            "ratio_sum": torch.where(finite, ratio, 0.0),
            "old_kl_sum": torch.where(finite, old_kl, 0.0),
            "kl_sum": torch.where(finite, kl, 0.0),
        }
        return torch.stack([values[name].sum(dtype=torch.float64) for name in GRPO_STATS])


def policy_loss(
    logps: Tensor, loss: Loss, old_logps: Tensor, advantages: Tensor, *, entropies: Tensor | None = None, **given
) -> tuple[Tensor, Tensor]:
    """A loss over a batch of tokens, and statistics that add over batches.

        loss = ((loss_of_each_token - entropy_coef * entropies) * weights)[mask].sum() / normalizer

    `aggregation`: `token` and `constant` sum all tokens, `sequence` the sequences' means; `normalizer` then divides.
    It is the caller's, and global (over ranks and micro-batches): all tokens, all sequences, or sequences * a constant
    length. So the losses of any split into whole sequences add up to the loss of the whole.

    A masked token, or one of weight 0, counts nowhere, whatever its values (NaN included). A token that counts and has
    a log-prob that is not finite makes the loss NaN.

    Args:
        logps: [R] floating: the policy's log-probs; nothing else is differentiated but the entropies.
        loss: `loss(logps, rows) -> [C]`, see `Rows`; `functools.partial(grpo, clip_high=0.28)` for one.
        old_logps: [R], the behaviour policy's.
        advantages: [R], or [S] with `cu_seqlens` (which it is where R = S).
        cu_seqlens: [S + 1] int32 or int64: sequence s holds rows cu_seqlens[s] to cu_seqlens[s + 1]; rows that no
            sequence holds are an error that is not checked. Needed by everything that is per sequence.
        ref_logps: [R], the reference policy's.
        weights: factor of each token's loss: [R] (which it is where R = S), or [S] with `cu_seqlens`.
        mask: [R] bool, False where a token does not count.
        aggregation: `token` (default), `sequence` or `constant`.
        normalizer: what the sum is divided by; > 0; a number or a tensor of one.
        surrogate: where the statistics say that GRPO's clips act; `grpo`'s own options if that is the loss.
        whole_sequences: whether the loss calls `Rows.sequence_mean`; `grpo` says it itself.
        count_weightless: whether unmasked tokens of weight 0 count in the statistics and in the mean of a sequence that
            `aggregation` takes, though not in the loss: as those that a correction has masked.
        entropy_coef: weight of the entropy bonus (1602.01783, section 4), 0 by default. A token's bonus has the mask,
            weight, aggregation and normalizer of its loss.
        entropies: [R], nats: the policy's at each token; needed with an entropy_coef that is not 0.

    Returns:
        loss: scalar, in the type of logps (at least fp32); 0 for an empty batch, still attached to logps.
        stats: [len(GRPO_STATS)] fp64 on the same device, named by GRPO_STATS, detached.

    Raises:
        ValueError: a shape, type, device or option that does not fit, naming it; or `loss` returned something else than
            a differentiable number per token.
    """
    objective = Objective(loss, logps.detach(), old_logps, advantages, **given)
    if entropies is not None:
        check("entropies", entropies, logps.shape, like=logps)
    elif objective.entropy_coef != 0:
        raise ValueError("entropies is needed with an entropy_coef that is not 0")
    return objective.total(logps, entropies), objective.statistics(logps)


def grpo_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, **given) -> tuple[Tensor, Tensor]:
    """`policy_loss` of `grpo`, whose options are among the keyword arguments.

    ratio = (logps - old_logps).exp()
    loss = -torch.minimum(ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A)[mask].sum() / normalizer
    """
    loss, given = split_options(given)
    return policy_loss(logps, loss, old_logps, advantages, **given)


def split_options(given: dict) -> tuple[Loss, dict]:
    """(`grpo` with its options, the other keyword arguments)."""
    options = {name: value for name, value in given.items() if name in SURROGATE_OPTIONS}
    return partial(grpo, **options), {name: value for name, value in given.items() if name not in options}


def sequence_of_row(offsets: Tensor, rows: Tensor) -> Tensor:
    """[R] int64: which sequence each row belongs to."""
    position = torch.arange(rows.shape[0], device=rows.device)
    found = torch.searchsorted(offsets[1:].long().contiguous(), position, right=True)
    return found.clamp(max=max(offsets.numel() - 2, 0))


def segment_sum(values: Tensor, segment: Tensor, segments: int) -> Tensor:
    """[segments]: sums of the values [R] of each segment; in a fixed order, which index_add has on a CPU alone."""
    if values.is_cuda:
        return values.new_zeros(segments).index_put((segment,), values, accumulate=True)
    return values.new_zeros(segments).index_add(0, segment, values)
