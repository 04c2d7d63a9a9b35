"""How far rollout engine and trainer may disagree about the same tokens before the run stops."""

from __future__ import annotations

from rethinker.config import Config


class MismatchError(RuntimeError):
    """The rollout engine does not sample from the policy that is trained."""


def check_mismatch(value: float, config: Config) -> None:
    """Check that the rollouts are those of the policy that is trained.

    Call it with the first step after a weight sync: until then the policy has not moved, so the k3 estimate shows
    rounding or weights that did not arrive; with rollout.max_staleness=1 also what the steps of one episode changed.
    Measured with the tiny model on CPU: 1e-12 nats in fp32, 1.4e-4 in bf16; 0.4 to 7 where every weight had moved by
    0.02 to 0.05 and did not arrive. A single small update that is lost shows in rollout.check_sync alone.

    Args:
        value: `mismatch_kl`, nats per token, the same on all ranks. NaN passes: its step was skipped and counted.

    Raises:
        MismatchError: above rollout.max_mismatch_kl.
    """
    ceiling = config.rollout.max_mismatch_kl
    if ceiling is None or config.rollout.backend == "recorded":  # recorded by a policy of its own
        return
    if value > ceiling:
        cause = "weights did not arrive in the rollout engine, or it computes differently from the trainer"
        if config.rollout.max_staleness:
            cause = f"the policy moves too far in an episode (rollout.max_staleness=0 waits for it), or {cause}"
        raise MismatchError(
            f"mismatch_kl={value:.3g} nats per token in the first step after a weight sync exceeds "
            f"rollout.max_mismatch_kl={ceiling:g}: {cause}; rollout.check_sync=true names the tensor that differs "
            "after a sync. Go on from the last checkpoint; null switches this check off"
        )
