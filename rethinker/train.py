"""The training loop, top to bottom.

    queries --rollout--> groups --reward--> rewards --forced rethinking--> groups --advantage--> samples
        --drop zero advantage--> effective samples --> replay.add ; replay.draw fills the batch to N
        --pack (shared prompts)--> packed batches --policy forward + fused loss--> backward --> optimizer step
    end of episode: sync weights to the rollout engine, clear replay, validate, checkpoint

`rethinker train RECIPE` runs it, on several processes `torchrun --nproc-per-node N -m rethinker train RECIPE`, and from
Python `rethinker.train(recipe, overrides)`. With several ranks each rolls out every world_size-th query; then all ranks
know all rewards, choose the same batch, and share its micro-batches; a response's tokens travel only to be trained.
What is not this flow (folder, logs, clock, validation, checkpoints) is the run's: see run.py.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rethinker.config import Config

if TYPE_CHECKING:
    from rethinker.samples import RunResult


def train(
    recipe: str | Path | Config = "sums_cpu", overrides: Sequence[str] | Mapping[str, Any] | None = None
) -> RunResult:
    """Train a policy, on all ranks of the process group.

    Args:
        recipe: a shipped recipe's name, a YAML file, or a Config that is complete; none of them is changed.
        overrides: settings that differ, as {"train.max_steps": 20} or ["--train.max_steps", "20"].

    Returns:
        What the run leaves behind: its folder, metrics, best checkpoint and validation accuracies.

    Raises:
        ConfigError: for a mistake in the settings or the data they name, before anything is written.

    A run that is asked to stop (SIGTERM, SIGINT) saves itself and returns what it has; `resume` continues it.
    """
    from rethinker.settings import load_config  # importing the package is to cost nothing

    config = copy.deepcopy(recipe) if isinstance(recipe, Config) else load_config(recipe, overrides)

    from rethinker.algorithm.advantages import assign_advantages  # from here on torch, then vLLM and DeepSpeed
    from rethinker.algorithm.selection import select_batch
    from rethinker.rewards.functions import reward_weights
    from rethinker.run import Run
    from rethinker.runtime.signals import StopRequested

    weights = reward_weights(config.reward)
    with Run(config) as run:
        policy, rollout, replay = run.policy, run.rollout, run.replay
        with suppress(StopRequested):
            while run.unfinished():
                if not run.groups:  # a new episode: rollout, reward, forced rethinking
                    episode = run.episodes.take(run.progress.episode, policy.version, run.times, run.groups_left)
                    assign_advantages(episode.groups, config.algorithm, weights, run.ranks.device)
                    run.begin_episode(episode)

                rollout.sleep()
                fresh = run.next_groups(config.train.batch_pairs // config.rollout.group_size)
                # Zero advantages are dropped, the rest enters replay, and draws from it fill the batch.
                batch = select_batch(fresh, replay, config, run.done)
                with run.step():  # packing, forward, fused loss, backward, optimizer
                    update = policy.train_step(batch.samples)
                run.trained(fresh, batch, update)

                if not run.groups:
                    with run.sync():
                        policy.version += 1
                        rollout.sync(policy.weights, policy.version)
                    replay.end_episode(policy.version - config.rollout.max_staleness)
                    run.end_episode()  # validation; the best policy so far is kept
                run.end_step()  # metrics; a checkpoint, where one is due
        return run.finish()


if __name__ == "__main__":
    raise SystemExit("error: start it as `rethinker train RECIPE` or `torchrun ... -m rethinker train RECIPE`")
