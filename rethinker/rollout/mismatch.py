"""How far rollout engine and trainer may disagree about the same tokens before the run stops."""

from __future__ import annotations

from rethinker.config import Config


class MismatchError(RuntimeError):
    """The rollout engine does not sample from the policy that is trained."""


def check_mismatch(value: float, config: Config) -> None:
    """Refuse to train on rollouts of another policy.

    Call it with the first step after a weight sync: until then the policy has not moved, so whatever the k3 estimate
    shows is rounding (below 1e-10 nats in fp32; bf16 noise of 0.03 nats in a log-prob gives 0.03^2 / 2 = 5e-4), or
    weights that did not arrive. The step's update has been made by then: the last checkpoint is the one to go on from.

    Args:
        value: `mismatch_kl`, nats per token, the same on all ranks. A NaN passes: the step that had it was skipped and
            counted.

    Raises:
        MismatchError: above rollout.max_mismatch_kl.
    """
    ceiling = config.rollout.max_mismatch_kl
    if ceiling is None or config.rollout.backend == "recorded":  # recorded by a policy of its own
        return
    if value > ceiling:
        raise MismatchError(
            f"mismatch_kl={value:.3g} nats per token in the first step after a weight sync exceeds "
            f"rollout.max_mismatch_kl={ceiling:g}: weights did not arrive in the rollout engine, or it computes "
            "differently from the trainer; rollout.check_sync=true names the tensor that differs after a sync. Go on "
            "from the last checkpoint; null switches this check off"
        )
