"""The training loop, top to bottom.

    queries --rollout--> groups --reward--> rewards --forced rethinking--> groups --advantage--> samples
        --drop zero advantage--> effective samples --> replay.add ; replay.draw fills the batch to N
        --pack (shared prompts)--> packed batches --policy forward + fused loss--> backward --> optimizer step
    end of episode: sync weights to the rollout engine, clear replay, validate, checkpoint

Run it with `rethinker train RECIPE`, `torchrun --nproc-per-node N -m rethinker.train RECIPE`, or from Python as
`rethinker.train(recipe, overrides)`. With several ranks each rolls out every world_size-th query; then all ranks know
all rewards, choose the same batch, and share its micro-batches; a response's tokens travel only to be trained.
"""

from __future__ import annotations

import math
import random
import sys
import time
import types
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rethinker.algorithm.advantages import assign_advantages
from rethinker.algorithm.replay import ReplayBuffer
from rethinker.algorithm.selection import select_batch
from rethinker.checkpoint.checkpoint import Checkpoints
from rethinker.checkpoint.resume import Progress, RunState, saved_state
from rethinker.checkpoint.run_directory import RunDirectory
from rethinker.config import Config, ConfigError
from rethinker.data.datasets import load_queries
from rethinker.data.images import check_images
from rethinker.data.prompts import PromptEncoder, select_fitting
from rethinker.data.streaming import open_stream
from rethinker.embedded.files import as_files, model_folder
from rethinker.episode import Episodes
from rethinker.evaluation.validation import validate
from rethinker.policy.engine import PolicyEngine
from rethinker.policy.model import load_processor
from rethinker.policy.throughput import model_flops_utilization, peak_memory_gb
from rethinker.report.learning import learning_curve
from rethinker.report.page import report_or_warning
from rethinker.rewards.checker import AnswerChecker
from rethinker.rollout.backends import make_engine
from rethinker.rollout.engine import RolloutEngine
from rethinker.rollout.mismatch import check_mismatch
from rethinker.runtime import distributed, signals
from rethinker.runtime.display import Display
from rethinker.runtime.distributed import Ranks
from rethinker.runtime.host_memory import return_free_memory
from rethinker.runtime.logs import RankLog
from rethinker.runtime.ownership import collect
from rethinker.runtime.profiling import PHASES, StepProfiler, phase
from rethinker.runtime.signals import StopRequested
from rethinker.runtime.watchdog import Watchdog
from rethinker.samples import Accuracy, Completion, Group, Query
from rethinker.settings import load_config


@dataclass(frozen=True)
class Run:
    """What a finished run leaves behind."""

    folder: Path
    """runs/<name>: config.yaml, metrics.jsonl, completions/, checkpoints/."""
    metrics: list[dict[str, Any]]
    """One entry per optimizer step, as in metrics.jsonl."""
    best_checkpoint: Path
    """The checkpoint with the best validation accuracy (the last one without validation)."""
    accuracy_before: Accuracy | None
    accuracy_after: Accuracy | None


def train(config: Config) -> Run:
    """Train a policy as `config` says, on all ranks of the process group.

    Returns:
        The run: its folder, metrics, best checkpoint and validation accuracies.

    Raises:
        ConfigError: for a mistake in the settings or the data they name, before anything is written.

    A run that is asked to stop (SIGTERM, SIGINT) saves itself and returns what it has; `resume` continues it.
    """
    G, N = config.rollout.group_size, config.train.batch_pairs
    stream, questions = open_stream(as_files(config.data, "train"), config.seed)
    held_out = load_held_out(config)
    check_images([*stream.queries, *held_out], config.data)
    total_steps = schedule_length(config, questions)
    with ExitStack() as stack:
        ranks = distributed.start(config.rollout.timeout_s)
        stack.callback(distributed.stop)
        config.run.name = ranks.broadcast(config.run.name)  # its default holds the time: ranks may read it differently
        seed_everything(config.seed)

        run = stack.enter_context(RunDirectory(config, enabled=ranks.is_main))
        checkpoints = Checkpoints(run.folder / "checkpoints", ranks, config.checkpoint)
        stack.callback(checkpoints.close)
        log = stack.enter_context(RankLog(run.folder / "logs", ranks.rank))
        watchdog = stack.enter_context(Watchdog(config.run.stall_s, log, ranks.rank))
        checkpoint = checkpoints.find(config.resume) if config.resume else None
        saved = saved_state(checkpoint, config)
        metrics = run.open_logs(saved.get("log", {}))
        model_dir = checkpoint or initial_model(config, ranks)
        encoder = PromptEncoder(load_processor(model_dir), config.data)
        held_out, _ = select_fitting(held_out, encoder)
        reference = initial_model(config, ranks) if config.algorithm.kl_coef > 0 else None
        budget_file = run.folder / "micro_batch_tokens.json"
        policy = PolicyEngine(config, model_dir, encoder, ranks, total_steps, reference, budget_file)
        rollout = make_engine(
            config, str(model_dir), rank=ranks.rank, world_size=ranks.world_size, local_rank=ranks.local_rank
        )
        stack.callback(rollout.close)
        checker = stack.enter_context(AnswerChecker(config.reward))
        episodes = Episodes(config, stream, encoder, rollout, checker, ranks)
        stack.callback(episodes.close)
        replay = ReplayBuffer(config.replay, config.seed, ranks.device)
        progress = Progress()
        state = RunState(config, ranks, progress, policy, episodes, replay, run)
        if checkpoint:
            state.load(checkpoint, saved)
        display = stack.enter_context(Display(total_steps, enabled=ranks.is_main, done=policy.steps))
        profiler = StepProfiler(config.profile.steps, run.folder)
        stack.callback(profiler.close)

        stack.enter_context(signals.handled())  # until here there is nothing to save, and a signal ends the process
        if checkpoint:
            display.resumed(checkpoint)
        else:
            accuracy = held_out_accuracy(held_out, rollout, encoder, checker, ranks, config)
            progress.before = progress.after = progress.best = accuracy
            display.validated(0, accuracy)
            run.log_validation(0, accuracy)
        budget = config.train.max_generated_tokens or math.inf

        def unfinished() -> bool:
            return policy.steps < total_steps and (bool(progress.groups) or progress.generated < budget)

        def another_episode() -> bool:
            return policy.steps + len(progress.groups) * G // N < total_steps and progress.generated < budget

        clock, times, saved_step = time.perf_counter(), {}, policy.steps if checkpoint else None
        while unfinished():
            watchdog.step = policy.steps + 1
            if not progress.groups:
                try:  # rollout, reward, forced rethinking
                    groups = episodes.take(progress.episode, policy.version, times)
                except StopRequested:
                    break
                progress.generated += sum(group.sampled_tokens for group in groups)
                progress.failed_checks = sum(ranks.gather(checker.failures.total()))
                assign_advantages(groups, config.algorithm.advantage_scale, ranks.device)
                if episodes.rethinker and episodes.rethinker.needs_scores:
                    rescore(groups, policy)
                progress.mismatch = None
                if config.algorithm.rollout_correction is not None:
                    progress.mismatch = policy.score([sample for group in groups for sample in group.samples()])
                    check_mismatch(progress.mismatch, config)
                if config.run.save_completions:
                    run.write_completions(progress.episode, collect(groups, ranks))
                progress.groups = groups[: (total_steps - policy.steps) * (N // G)]
                if config.rollout.max_staleness and another_episode():
                    episodes.begin(progress.episode + 1, policy.version, times)

            rollout.sleep()
            fresh, progress.groups = progress.groups[: N // G], progress.groups[N // G :]
            batch = select_batch(fresh, name=config.algorithm.name, pairs=N, replay=replay)
            with phase("train", times), profiler.step(policy.steps + 1):
                update = policy.train_step(batch.samples)
            if progress.mismatch is None:  # the policy has not moved since the sync: both differ by rounding alone
                progress.mismatch = update["old_kl"]
                check_mismatch(progress.mismatch, config)
            row = describe(policy.steps, progress, fresh, update) | batch.metrics(replay)
            row |= {"left_out_queries": encoder.dropped.total(), "failed_checkpoints": checkpoints.failed}
            if not progress.groups:
                episodes.wait(times)
                with phase("sync", times):
                    policy.version += 1
                    rollout.sync(policy.weights, policy.version)
                replay.end_episode(policy.version - config.rollout.max_staleness)
                progress.episode += 1
                return_free_memory()
                if not unfinished() or progress.episode % config.validation.every == 0:
                    accuracy = held_out_accuracy(held_out, rollout, encoder, checker, ranks, config)
                    display.validated(policy.steps, accuracy)
                    run.log_validation(policy.steps, accuracy)
                    progress.after = accuracy
                    if accuracy and accuracy.overall > progress.best.overall:
                        progress.best = accuracy
                        checkpoints.save_best(policy.steps, policy.model_snapshot())
                    row["val_accuracy"] = accuracy and accuracy.overall
            now = time.perf_counter()
            row |= measure(update, policy, times, now - clock)
            clock, times = now, {}
            metrics.append(row)
            run.log(row)
            display.step(row)
            stops = ranks.any(signals.requested() is not None)
            if stops or (config.checkpoint.every and policy.steps % config.checkpoint.every == 0):
                with phase("checkpoint", times):
                    checkpoints.save(policy.steps, policy.model_snapshot(), state.snapshot())
                saved_step = policy.steps
            if stops:
                break

        if saved_step != policy.steps:
            checkpoints.save(policy.steps, policy.model_snapshot(), state.snapshot())
        checkpoints.wait()
        folder = run.folder / "checkpoints"
        improved = progress.best != progress.before and (folder / "best").exists()
        result = Run(run.folder, metrics, folder / ("best" if improved else "last"), progress.before, progress.after)
        if unfinished():
            display.stopped(signals.requested() or "stopped on another rank", policy.steps, run.folder)
            return result
        report = None
        if ranks.is_main:
            learning_curve([run.folder], run.folder / "learning.png")
            report = report_or_warning(run.folder)
        display.summary(result, report)
    return result


def rescore(groups: list[Group], policy: PolicyEngine) -> None:
    """Give rethought responses the behaviour log-probs of the policy's own forward (collective)."""
    rethought = [sample for group in groups for sample in group.samples() if sample.completion.supervised]
    policy.score(rethought)
    for sample in rethought:
        if isinstance(sample.completion, Completion):
            sample.completion.logprobs = sample.completion.trainer_logprobs


def held_out_accuracy(
    held_out: list[Query],
    rollout: RolloutEngine,
    encoder: PromptEncoder,
    checker: AnswerChecker,
    ranks: Ranks,
    config: Config,
) -> Accuracy | None:
    """Greedy accuracy on the held-out questions; None without any."""
    if not held_out:
        return None
    with phase("validation"):
        return validate(held_out, rollout, encoder, checker, ranks, config.rollout.max_new_tokens)


def describe(step: int, progress: Progress, fresh: list[Group], update: dict[str, float]) -> dict[str, Any]:
    """The step's metrics that do not depend on the clock; rewards and lengths are those of the fresh rollouts.

    `rethink_*` are shares of the step's responses.
    """
    responses = sum(len(group.completions) for group in fresh)
    return {
        "step": step,
        "episode": progress.episode,
        "reward_mean": float(np.mean([reward for group in fresh for reward in group.rewards])),
        "response_length_mean": float(np.mean([c.tokens for group in fresh for c in group.completions])),
        "rethink_ratio": float(np.mean([cue for group in fresh for cue in group.rethinks])),
        **{
            f"rethink_{what}": sum(getattr(group.rethinking, what) for group in fresh) / responses
            for what in ("forced", "kept", "fixed", "broken")
        },
        "val_accuracy": None,
        "mismatch_kl": progress.mismatch,
        "failed_checks": progress.failed_checks,
        "generated_tokens": progress.generated,
        **update,
    }


def measure(update: dict[str, float], policy: PolicyEngine, times: dict[str, float], step_s: float) -> dict[str, Any]:
    """The step's speed: seconds since the last step by phase, tokens/s and MFU of training, memory."""
    seconds = {f"time_{name}_s": times.get(f"time_{name}_s", 0.0) for name in PHASES}
    training = seconds["time_train_s"]
    return {
        "tokens_per_s": update["train_tokens"] / training,
        "mfu": model_flops_utilization(policy.policy.hf, update["train_tokens"], training, policy.ranks),
        **seconds,
        "step_s": step_s,
        "peak_memory_gb": peak_memory_gb(),
    }


def load_held_out(config: Config) -> list[Query]:
    """The validation questions: the first `validation.size` of a seeded shuffle, the same ones at every seed."""
    if config.data.validation is None:
        return []
    queries = load_queries(as_files(config.data, "validation"), "validation", most=config.validation.size)
    random.Random(0).shuffle(queries)
    return queries[: config.validation.size]


def schedule_length(config: Config, queries: int | None) -> int:
    """Optimizer steps of the run: train.max_steps, or what train.epochs over so many queries amounts to."""
    G, N = config.rollout.group_size, config.train.batch_pairs
    steps = config.train.max_steps or int(config.train.epochs * queries) * G // N
    if steps < 1:
        raise ConfigError(
            f"train.epochs={config.train.epochs} over {queries} queries is less than one step of "
            f"train.batch_pairs={N}; set train.max_steps, or train.batch_pairs to at most {queries * G}"
        )
    return steps


def initial_model(config: Config, ranks: Ranks) -> Path:
    """Where training starts: policy.model, or the tiny model that rank 0 builds and warms up."""
    return Path(ranks.broadcast(model_folder(config) if ranks.is_main else None))


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch alike on every rank."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class _CallableModule(types.ModuleType):
    """Makes `rethinker.train(recipe, overrides)` work although `rethinker.train` is this module."""

    def __call__(
        self, recipe: str | Path = "easy_vqa_cpu", overrides: Sequence[str] | Mapping[str, Any] | None = None
    ) -> Run:
        """Train `recipe` (a shipped name or a YAML file) with `overrides` ({"train.max_steps": 20}); see `train`."""
        return train(load_config(recipe, overrides))


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    from rethinker.cli import train_main

    sys.exit(train_main(sys.argv[1:]))
