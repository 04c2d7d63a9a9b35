"""What lies around the loss that `algorithm.loss` names: its check, its inputs, what divides its sum.

Shapes: R response tokens and S responses of a packed row, C tokens that a loss gets at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rethinker.algorithm import losses
from rethinker.config import AlgorithmConfig, ConfigError, one_line
from rethinker.runtime.user_code import user_function
from rethinker.samples import PackedBatch, Sample
from rethinker_kernels.losses import SURROGATE_OPTIONS, NeedsSequences, Objective, Surrogate, kl_estimate


@dataclass(frozen=True)
class PolicyLoss:
    """A loss with the settings that it takes."""

    function: Callable[[Tensor, losses.Rows], Tensor]
    whole_sequences: bool
    """Whether it calls `Rows.sequence_mean`: then all log-probs are computed before it, with one more product."""


def shipped_losses() -> dict[str, Callable[..., Tensor]]:
    """The public functions of losses.py whose first parameters are (logps, rows), by name."""
    functions = {name: f for name, f in vars(losses).items() if inspect.isfunction(f) and not name.startswith("_")}
    return {name: f for name, f in functions.items() if list(inspect.signature(f).parameters)[:2] == ["logps", "rows"]}


def load_loss(config: AlgorithmConfig, device: torch.device | str = "cpu") -> PolicyLoss:
    """The loss that `algorithm.loss` names, tried on a few tokens on a device, and with `algorithm.kl_coef` the KL term
    beside it: a loss that has a parameter `kl_coef` adds its own.

    Raises:
        ConfigError: it does not exist, takes a parameter that is no setting, or does not return a finite number per
            token with a gradient; the message names algorithm.loss.
    """
    named = f"algorithm.loss={config.loss}"
    function = user_function("algorithm.loss", config.loss, shipped_losses())
    try:
        _, _, *options = inspect.signature(function).parameters.values()
    except ValueError as error:  # fewer parameters, or a builtin without a signature
        raise ConfigError(f"{named}: it must take (logps, rows), and then settings by name") from error
    settings, given = vars(config), {}
    for option in options:
        if option.name in settings:
            given[option.name] = settings[option.name]
        elif option.default is option.empty and option.kind not in (option.VAR_POSITIONAL, option.VAR_KEYWORD):
            raise ConfigError(
                f"{named}: its parameter {option.name!r} is no setting of algorithm and has no default; there are "
                f"{', '.join(sorted(settings))}"
            )
    defaults = vars(AlgorithmConfig())
    for name in ("dual_clip", "importance", "tau_positive", "tau_negative"):
        if name not in given and settings[name] != defaults[name]:
            default = "null" if defaults[name] is None else defaults[name]
            raise ConfigError(
                f"{named}: it has no parameter {name}, so algorithm.{name}={settings[name]} would change nothing; set "
                f"algorithm.{name}={default}{', or give it one' * (':' in config.loss)}"
            )
    loss = partial(function, **given)
    try:
        whole_sequences = _tried(loss, config, device)
    except ConfigError as error:
        raise ConfigError(f"{named}: {error}") from error
    except (Exception, SystemExit) as error:  # the user's code raises anything
        raise ConfigError(f"{named}: it fails on a batch of 9 tokens ({one_line(error.__cause__ or error)})") from error
    if config.kl_coef != 0 and "kl_coef" not in given:
        loss = partial(_with_kl, loss=loss, kl_coef=config.kl_coef, kl_estimator=config.kl_estimator)
    return PolicyLoss(loss, whole_sequences)


def _with_kl(
    logps: Tensor, rows: losses.Rows, loss: Callable[[Tensor, losses.Rows], Tensor], kl_coef: float, kl_estimator: str
) -> Tensor:
    """A loss with `grpo`'s KL term."""
    found = loss(logps, rows)
    if not isinstance(found, Tensor) or found.shape != logps.shape:  # the op says what is wrong with it
        return found
    return found + kl_coef * kl_estimate(logps, rows.ref_logps, kl_estimator)


def _tried(loss: Callable[[Tensor, losses.Rows], Tensor], config: AlgorithmConfig, device: torch.device | str) -> bool:
    """Whether the loss needs whole responses, after a trial on 9 tokens of 3 responses, on and off policy."""
    logps = -torch.tensor([0.1, 2.0, 0.7, 1.1, 0.4, 3.0, 0.2, 0.9, 1.5], device=device)
    off_policy = torch.tensor([0.0, 0.1, -0.1, 0.0, 0.9, -0.9, 0.0, 0.9, -0.9], device=device)
    inputs = {
        "old_logps": logps - off_policy,
        "advantages": torch.tensor([1.0, -1.0, 0.5], device=device),
        "ref_logps": logps - 0.1 if config.kl_coef else None,
        "cu_seqlens": torch.tensor([0, 4, 6, 9], device=device),
        "mask": torch.arange(9, device=device) != 3,
        "surrogate": surrogate_of(config),
        "normalizer": 8.0,
    }
    objective = Objective(loss, logps, **inputs)
    parts = [slice(0, 9)] if objective.whole_sequences else [slice(0, 5), slice(5, 6), slice(6, 9)]
    try:
        slope = torch.cat([objective.slopes(logps[part], part) for part in parts])
        if not torch.allclose(slope, objective.slopes(logps, slice(0, 9)), rtol=1e-3, atol=1e-6, equal_nan=True):
            raise ConfigError(
                "a token's gradient depends on which other tokens it comes with, and these are any part of a batch; "
                "take means over a response with rows.sequence_mean, and draw no random numbers"
            )
    except NeedsSequences:
        objective = Objective(loss, logps, **inputs, whole_sequences=True)
        slope = objective.slopes(logps)
    value = objective.total(logps)
    if not (value.isfinite() and slope.isfinite().all()):
        what = "loss" if not value.isfinite() else "gradient"
        raise ConfigError(
            f"its {what} is not finite for ordinary log-probs (NaN or inf); log a negative number, or 0 / 0?"
        )
    if not slope.any():
        raise ConfigError("its gradient is 0 for every token; compute it from logps, without detach()")
    return objective.whole_sequences


def surrogate_of(config: AlgorithmConfig) -> Surrogate:
    """GRPO's options, by which the statistics of every loss are counted."""
    return Surrogate(**{name: getattr(config, name) for name in SURROGATE_OPTIONS})


def loss_inputs(
    loss: PolicyLoss, batch: PackedBatch, config: AlgorithmConfig, normalizer: float, ref_logps: Tensor | None = None
) -> dict[str, Any]:
    """What `rethinker_kernels.linear_policy_loss` needs of a micro-batch beside hidden states, head and tokens.

    The losses of a step's micro-batches, over all ranks, add up to the step's loss, with the `loss_normalizer` of the
    whole step. A token that counts and whose log-prob is not finite makes the loss NaN: the step is then to be skipped.
    `ref_logps` [R], the reference policy's, are needed where `algorithm.kl_coef` is not 0.
    """
    return {
        "loss": loss.function,
        "whole_sequences": loss.whole_sequences,
        "surrogate": surrogate_of(config),
        "old_logps": batch.old_logps,
        "advantages": batch.advantages,
        "cu_seqlens": batch.cu_seqlens,
        "ref_logps": ref_logps,
        "aggregation": config.aggregation,
        "weights": batch.weights,
        "mask": batch.loss_mask,
        "count_weightless": config.rollout_correction is not None or config.top_entropy is not None,
        "nll_weights": batch.nll_weights,
        "normalizer": normalizer,
        "entropy_coef": config.entropy_coef,
    }


def has_gradient(sample: Sample, config: AlgorithmConfig) -> bool:
    """Whether a sample can move the policy.

    Without an advantage the loss of every shipped function is 0 whatever the ratio, and so is its gradient: such a
    sample counts in the normalizer alone. A KL term, an entropy bonus, the supervised term, or a loss of the user's own
    need no advantage.
    """
    needs_no_advantage = is_users(config) or config.kl_coef != 0 or config.entropy_coef != 0
    return needs_no_advantage or sample.completion.supervised or sample.advantage != 0


def is_users(config: AlgorithmConfig) -> bool:
    """Whether `algorithm.loss` is a function of the user's own, of which nothing is known."""
    return ":" in config.loss


def loss_normalizer(samples: list[Sample], config: AlgorithmConfig, max_new_tokens: int) -> float:
    """What a step's summed loss is divided by, from all samples of the step over all ranks.

    With `algorithm.aggregation` token: the trainable tokens; sequence: the samples; constant: the samples times
    `max_new_tokens`. Samples of weight 0 count nowhere. At least 1: a step without a trainable token has loss 0.
    """
    counted = [sample for sample in samples if sample.weight != 0]
    if config.aggregation == "token":
        return float(max(1, sum(sample.completion.trainable_tokens for sample in counted)))
    return float(max(1, len(counted) * (max_new_tokens if config.aggregation == "constant" else 1)))


def supervised_weight(samples: list[Sample], weight: float) -> float:
    """Factor of every token's -log p in the supervised term: `weight` over the tokens of all rethought responses of a
    step, over all ranks."""
    tokens = sum(sample.completion.tokens for sample in samples if sample.completion.supervised)
    return weight / tokens if tokens else 0.0
