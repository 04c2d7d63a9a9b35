"""grpo_loss: the clipped surrogate of GRPO, its KL term and its statistics, from log-probs."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rethinker_kernels import reference
from rethinker_kernels.arguments import Surrogate, check_grpo
from rethinker_kernels.devices import takes_triton
from rethinker_kernels.reference import GRPO_STATS


def grpo_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    ref_logps: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    kl_estimator: Literal["k1", "k2", "k3"] = "k3",
    importance: Literal["token", "sequence"] = "token",
    aggregation: Literal["token", "sequence", "constant"] = "token",
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    normalizer: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate of GRPO with an optional KL term, and statistics that add over batches.

        ratio = (logps - old_logps).exp()
        loss = -torch.minimum(ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A)[mask].sum() / normalizer

    `dual_clip` bounds the ratio of negative advantages from above. With d = ref_logps - logps the KL estimators are
    k1 = -d, k2 = d^2 / 2, k3 = exp(d) - d - 1, and kl_coef * KL is added to each token's loss.
    `importance="sequence"` (GSPO) takes one ratio per sequence: exp(mean over its tokens of logps - old_logps).
    `aggregation`: `token` and `constant` sum all tokens, `sequence` the sequences' means; `normalizer` then divides.
    It is the caller's, and global (over ranks and micro-batches): all tokens, all sequences, or sequences * a constant
    length. So the losses of any split into whole sequences add up to the loss of the whole.

    A masked token, or one of weight 0, counts nowhere, whatever its values (NaN included). Log-ratios are clamped to
    +-20 and have no gradient beyond. A token that counts and has a non-finite log-prob or advantage makes the loss
    non-finite (NaN for a log-prob). On a GPU loss, statistics and gradient are made in one launch, and a second adds
    up partial sums, always in the same order.

    Args:
        logps: [R] floating: the policy's log-probs; the only input that is differentiated (once).
        old_logps: [R], the behaviour policy's.
        advantages: [R], or [S] with `cu_seqlens` (which it is where R = S).
        cu_seqlens: [S + 1] int32 or int64: sequence s holds rows cu_seqlens[s] to cu_seqlens[s + 1]; rows that no
            sequence holds are an error that is not checked. Needed by everything that is per sequence.
        ref_logps: [R], the reference policy's; needed when kl_coef is not 0.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        dual_clip: bound > 1, or None.
        weights: factor of each token's loss, KL term included: [R] (which it is where R = S), or [S] with `cu_seqlens`.
        mask: [R] bool, False where a token does not count.
        normalizer: what the sum is divided by; > 0.

    Returns:
        loss: scalar, in the type of logps (at least fp32); 0 for an empty batch, still attached to logps.
        stats: [len(GRPO_STATS)] fp64 on the same device, named by GRPO_STATS, detached.

    Raises:
        ValueError: a shape, type, device or option that does not fit, naming it.
    """
    options = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip, "kl_coef": kl_coef}
    options |= {"kl_estimator": kl_estimator, "importance": importance, "aggregation": aggregation}
    tensors = {"cu_seqlens": cu_seqlens, "ref_logps": ref_logps, "weights": weights, "mask": mask}
    if not takes_triton(logps):
        return reference.grpo_loss(logps, old_logps, advantages, **tensors, normalizer=normalizer, **options)
    check_grpo(logps, old_logps, advantages, Surrogate(**options), **tensors, normalizer=normalizer)
    loss, stats, _ = _grpo_loss(logps, old_logps, advantages, **tensors, **split_normalizer(normalizer), **options)
    return loss, stats


def split_normalizer(normalizer: float | Tensor) -> dict[str, float | Tensor | None]:
    """As torch ops take it: `normalizers` on the device or None, and `normalizer` on the host."""
    on_device = isinstance(normalizer, Tensor)
    return {
        "normalizers": normalizer.detach() if on_device else None,
        "normalizer": 1.0 if on_device else float(normalizer),
    }


@torch.library.custom_op("rethinker::grpo_loss", mutates_args=())
def _grpo_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor | None,
    ref_logps: Tensor | None,
    weights: Tensor | None,
    mask: Tensor | None,
    normalizers: Tensor | None,
    normalizer: float,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    kl_coef: float,
    kl_estimator: str,
    importance: str,
    aggregation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    from rethinker_kernels.triton_kernels.grpo_loss import loss_and_gradient

    return loss_and_gradient(
        logps,
        old_logps,
        advantages,
        cu_seqlens,
        ref_logps,
        weights,
        mask,
        normalizers,
        normalizer,
        Surrogate(clip_low, clip_high, dual_clip, kl_coef, kl_estimator, importance, aggregation),
        statistics=len(GRPO_STATS),
    )


@_grpo_loss.register_fake
def _(logps, *_):
    return (
        logps.new_empty((), dtype=torch.float32),
        logps.new_empty(len(GRPO_STATS), dtype=torch.float64),
        logps.new_empty(logps.shape, dtype=torch.float32),
    )


def _setup(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    _, stats, gradient = output
    ctx.mark_non_differentiable(stats, gradient)
    ctx.save_for_backward(gradient)
    ctx.dtype, ctx.others = inputs[0].dtype, len(inputs) - 1


def _gradient(ctx, grad_loss, *_):
    if grad_loss is None:
        return (None,) * (1 + ctx.others)
    (gradient,) = ctx.saved_tensors
    return ((grad_loss * gradient).to(ctx.dtype), *(None,) * ctx.others)


_grpo_loss.register_autograd(_gradient, setup_context=_setup)
