"""A run while it goes on: its parts, and what is not the flow of data, such as logs, clock and checkpoints."""

from __future__ import annotations

import ctypes
import logging
import math
import random
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from rethinker.algorithm.objective import load_loss
from rethinker.algorithm.replay import ReplayBuffer
from rethinker.algorithm.selection import Batch, category_metrics, environment_metrics, function_metrics
from rethinker.checkpoint.checkpoint import Checkpoints
from rethinker.checkpoint.resume import Progress, RunState, saved_state
from rethinker.checkpoint.run_directory import RunDirectory
from rethinker.checks import schedule_length
from rethinker.config import Config, ConfigError
from rethinker.data.datasets import load_queries
from rethinker.data.mixture import category_of
from rethinker.data.prompts import FIRST, PromptEncoder, select_fitting
from rethinker.data.streaming import open_stream
from rethinker.embedded.files import as_files, model_folder
from rethinker.environments import load as load_environment
from rethinker.environments.tools import schemas
from rethinker.episode import Episode, Episodes, check_mismatch, score_again
from rethinker.evaluation.answering import open_model, validate
from rethinker.policy.engine import PolicyEngine
from rethinker.policy.loading import load_processor
from rethinker.policy.throughput import model_flops_utilization, peak_memory_gb
from rethinker.report.learning import learning_curve
from rethinker.report.page import report_or_warning
from rethinker.rewards.functions import load_rewards
from rethinker.rollout.sampling import seed_everything
from rethinker.runtime import distributed, signals
from rethinker.runtime.display import Display
from rethinker.runtime.garbage import no_full_collections
from rethinker.runtime.logs import rank_log
from rethinker.runtime.ownership import collect
from rethinker.runtime.profiling import PHASES, StepProfiler, phase
from rethinker.runtime.signals import StopRequested
from rethinker.samples import Accuracy, Group, Query, RunResult

log = logging.getLogger(__name__)

KEPT_ANSWERS = 32
"""Held-out questions whose greedy answers are kept at each validation."""


class Run:
    """Opens all parts of a run on entry, on every rank, and closes them on exit."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._row: dict[str, Any] = {}  # the running step's
        self.times: dict[str, float] = {}
        """Seconds of each phase since the last step ended, as `time_<phase>_s`."""

    def __enter__(self) -> Run:
        with ExitStack() as stack:
            self._open(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._stack.__exit__(*error)

    def _open(self, stack: ExitStack) -> None:
        config = self.config
        load_loss(config.algorithm)  # the policy loads it for itself, the checker of answers the rewards
        load_rewards(config.reward, config.rollout.max_new_tokens)  # mistakes are reported before anything slow
        load_environment(config.environment)
        stream, questions = open_stream(as_files(config.data, "train"), config.seed)
        held_out = load_held_out(config)
        self.total_steps = schedule_length(config, questions)
        self.ranks = ranks = distributed.start(config.rollout.timeout_s)
        stack.callback(distributed.stop)
        config.run.name = ranks.broadcast(config.run.name)  # its default holds the time, and ranks' clocks differ
        seed_everything(config.seed)

        self.directory = stack.enter_context(RunDirectory(config, enabled=ranks.is_main))
        self.folder = self.directory.folder
        self.checkpoints = Checkpoints(self.folder / "checkpoints", ranks, config.checkpoint)
        stack.callback(self.checkpoints.close)
        stack.enter_context(rank_log(self.folder / "logs", ranks.rank, config.run.stall_s))
        checkpoint = self.checkpoints.find(config.resume) if config.resume else None
        saved = saved_state(checkpoint, config)
        self.metrics: list[dict[str, Any]] = self.directory.open_logs(saved.get("log", {}))
        model = checkpoint or Path(model_folder(config, ranks))
        self.encoder = PromptEncoder(load_processor(model), config.data, schemas(config.environment))
        self.held_out, _ = select_fitting(held_out, self.encoder)
        self.encoder.check([*stream.peek(FIRST), *self.held_out[:FIRST]])
        started_elsewhere = checkpoint and (config.algorithm.kl_coef > 0 or config.policy.lora.rank)
        initial = Path(model_folder(config, ranks)) if started_elsewhere else None
        budget_file = self.folder / "micro_batch_tokens.json"
        self.policy = PolicyEngine(config, model, self.encoder, ranks, self.total_steps, initial, budget_file)
        self.model = stack.enter_context(open_model(config, str(model), ranks, self.encoder))
        self.rollout, self.checker = self.model.rollout, self.model.checker
        parts = stream, self.encoder, self.rollout, self.checker, ranks, self.model.dialogue
        self.episodes = Episodes(config, *parts)
        stack.callback(self.episodes.close)
        self.replay = ReplayBuffer(config.replay, config.seed)
        self.progress = Progress()
        self._state = RunState(config, ranks, self.progress, self.policy, self.episodes, self.replay, self.directory)
        if checkpoint:
            self._state.load(checkpoint, saved)
        self.checkpoints.rehearse(
            self.policy.save_files,
            lambda folder: self._state.snapshot(optimizer=False)(folder),  # within it, where all ranks hear of a fault
            self.policy.checkpoint_bytes(),
        )
        if config.rollout.backend == "server":  # now: an episode may be sampled in a thread, without collectives
            self.rollout.sync(self.policy.weights, self.policy.version)
        self.display = Display(self.total_steps, enabled=ranks.is_main, done=self.policy.steps)
        self._profiler = StepProfiler(config.profile.steps, self.folder)
        stack.callback(self._profiler.close)

        stack.enter_context(signals.handled())  # until here there is nothing to save, and a signal ends the process
        if checkpoint:
            self.display.resumed(checkpoint)
            if self.progress.unvalidated:
                self._keep_best()
        else:
            self.progress.before = self.progress.after = self.progress.best = self._validate(step=0)
        if failure := self._failure():
            raise ConfigError(failure)
        self._saved_step = self.policy.steps if checkpoint else None
        stack.enter_context(no_full_collections())
        self._clock = time.perf_counter()

    @property
    def groups(self) -> list[Group]:
        """The episode's groups that are rewarded and not trained on yet; empty between two episodes."""
        return self.progress.groups

    @property
    def groups_left(self) -> int:
        """Groups that the remaining steps train on."""
        per_step = self.config.train.batch_pairs // self.config.rollout.group_size
        return (self.total_steps - self.policy.steps) * per_step

    def unfinished(self) -> bool:
        """Whether there is another step to do."""
        return self.policy.steps < self.total_steps and (bool(self.groups) or self._may_sample())

    @property
    def done(self) -> float:
        """How far the run is, 0 to 1: its steps, or its budget of tokens if that is further, as the learning rate."""
        return min(1.0, max(self.policy.steps / self.total_steps, self.policy.budget_spent))

    def _may_sample(self) -> bool:
        return self.progress.generated < (self.config.train.max_generated_tokens or math.inf)

    def begin_episode(self, episode: Episode) -> None:
        """Take over an episode's groups, with rewards and advantages, to be trained on (collective).

        Raises:
            MismatchError: the rollout engine does not sample from the policy.
        """
        config, progress = self.config, self.progress
        self.policy.budget_spent = progress.generated / (config.train.max_generated_tokens or math.inf)
        groups, sampled = episode.groups, episode.sampled
        progress.generated += sum(group.sampled_tokens for group in sampled)
        progress.sampled_queries, progress.refill_rounds = len(sampled), episode.rounds
        progress.sampled_effective = sum(group.effective for group in sampled)
        progress.failed_checks = sum(self.ranks.gather(self.checker.failures.total()))
        per_step = config.train.batch_pairs // config.rollout.group_size
        self.rollout.sleep()  # scoring needs its memory
        scored = score_again(groups, groups[:per_step], self.policy, self.episodes.rethinker, config)
        progress.mismatch, progress.weighed = scored
        if config.run.save_completions:
            self.directory.write_completions(progress.episode, collect(sampled, self.ranks))
        self.replay.forget({group.query.id for group in episode.dropped if len(set(group.right)) < 2})
        episode.dropped.clear()  # the loop holds the episode while it trains
        progress.groups = groups[: self.groups_left]
        another = len(progress.groups) < self.groups_left and self._may_sample()
        if config.rollout.max_staleness and another:
            self.episodes.begin(progress.episode + 1, self.policy.version, self.times)

    def next_groups(self, n: int) -> list[Group]:
        """The next n groups of the episode, which are trained on now."""
        fresh, self.progress.groups = self.groups[:n], self.groups[n:]
        return fresh

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around the optimizer step: its phase, and its trace if `profile.steps` asks for one."""
        with phase("train", self.times), self._profiler.step(self.policy.steps + 1):
            yield

    def trained(self, fresh: list[Group], batch: Batch, update: dict[str, float]) -> None:
        """Note what the step trained on and did; rewards, lengths and rethinking are those of the fresh rollouts.

        Raises:
            MismatchError: the rollout engine did not sample from the policy.
        """
        # Until its first step the policy has not moved since the sync: it differs from the rollouts' by rounding alone.
        if self.progress.mismatch is None:
            self.progress.mismatch = update["old_kl"]
            check_mismatch(self.progress.mismatch, self.config)
        if update["skipped"]:
            log.warning("step %d is not applied: a loss, gradient or log-prob is not finite", self.policy.steps)
        responses = [c for group in fresh for c in group.completions]
        self._row = {
            "step": self.policy.steps,
            "episode": self.progress.episode,
            "reward_mean": float(np.mean([reward for group in fresh for reward in group.rewards])),
            "response_length_mean": float(np.mean([length for group in fresh for length in group.lengths])),
            "truncated_ratio": sum(cut for group in fresh for cut in group.truncated) / len(responses),
            "fast_ratio": sum(fast for group in fresh for fast in group.fast) / len(responses),
            "rethink_ratio": float(np.mean([cue for group in fresh for cue in group.rethinks])),
            **environment_metrics(fresh, self.config),
            **{
                f"rethink_{what}": sum(getattr(group.rethinking, what) for group in fresh) / len(responses)
                for what in ("forced", "kept", "fixed", "broken")
            },
            "val_accuracy": None,
            "mismatch_kl": self.progress.mismatch,
            **self.progress.weighed,
            "failed_checks": self.progress.failed_checks,
            "generated_tokens": self.progress.generated,
            **update,
            **batch.metrics(self.replay),
            "sampled_queries": self.progress.sampled_queries,
            "sampled_effective_ratio": self.progress.sampled_effective / max(1, self.progress.sampled_queries),
            "refill_rounds": self.progress.refill_rounds,
            **category_metrics(fresh, batch.draws),
            **function_metrics(fresh),
            "left_out_queries": self.encoder.dropped.total(),
            "failed_checkpoints": self.checkpoints.failed,
        }

    def sync(self) -> AbstractContextManager[None]:
        """Around the weight sync: its phase, once an episode that was begun ahead has left the engine."""
        self.episodes.wait(self.times)
        return phase("sync", self.times)

    def end_episode(self) -> None:
        """Move the reference policy, where `algorithm.reference_every` says so; validate, where `validation.every` says
        so, and keep the best policy."""
        progress = self.progress
        progress.episode += 1
        if self.policy.moving and progress.episode % self.config.algorithm.reference_every == 0:
            self.policy.moving.move()
        return_free_memory()
        if self.unfinished() and progress.episode % self.config.validation.every:
            return
        accuracy = self._keep_best()
        self._row["val_accuracy"] = accuracy and accuracy.overall

    def _keep_best(self) -> Accuracy | None:
        """Validate, and keep the policy if it is the best one so far; where the validation fails for a reward function
        that must not, this is left to the resumed run."""
        progress = self.progress
        accuracy = self._validate(self.policy.steps)
        progress.unvalidated = accuracy is None and bool(self.held_out)
        if progress.unvalidated:
            return None
        progress.after = accuracy
        if accuracy and (progress.best is None or accuracy.overall > progress.best.overall):
            progress.best = accuracy
            self.checkpoints.save_best(self.policy.steps, self.policy.model_snapshot())
        return accuracy

    def _failure(self) -> str | None:
        """Why a reward function stops the run, on whichever rank it failed (collective)."""
        return next(filter(None, self.ranks.gather(self.checker.stopping)), None)

    def end_step(self) -> None:
        """Log the step, and save where `checkpoint.every` says so.

        Raises:
            StopRequested: on every rank, once the run is saved, if one of them was asked to stop, or a reward function
                failed there whose on_failure is stop.
        """
        now, row, policy = time.perf_counter(), self._row, self.policy
        row |= {f"time_{name}_s": self.times.get(f"time_{name}_s", 0.0) for name in PHASES}
        training, tokens = row["time_train_s"], row["train_tokens"]
        row |= {
            "tokens_per_s": tokens / training,
            "mfu": model_flops_utilization(policy.policy.hf, tokens, training, policy.ranks),
            "step_s": now - self._clock,
            "peak_memory_gb": peak_memory_gb(),
        }
        self._clock, self.times = now, {}
        self.metrics.append(row)
        self.directory.log(row)
        self.display.step(row)
        stops = self.ranks.any(signals.requested() is not None or self.checker.stopping is not None)
        every = self.config.checkpoint.every
        if stops or (every and self.policy.steps % every == 0):
            with phase("checkpoint", self.times):
                self._save()
        if stops:
            raise StopRequested

    def finish(self) -> RunResult:
        """Save what is not saved, and report what the run did, or how to go on where it was stopped.

        Raises:
            ConfigError: once the run is saved, if it stopped because a reward function failed.
        """
        failure = self._failure()  # before what may fail on one rank alone: the others would wait for it
        if self._saved_step != self.policy.steps:
            self._save()
        self.checkpoints.wait()
        self.checkpoints.settle_best(improved=self.progress.best != self.progress.before)
        best = self.folder / "checkpoints" / "best"
        if failure:
            raise ConfigError(f"{failure}. The run is saved at step {self.policy.steps}: --resume auto goes on there")
        result = RunResult(self.folder, self.metrics, best, self.progress.before, self.progress.after)
        if self.unfinished():
            self.display.stopped(
                signals.requested() or "stopped on another rank", self.policy.steps, self.folder, self.ranks.world_size
            )
            return result
        report = None
        if self.ranks.is_main:
            learning_curve([self.folder], self.folder / "learning.png")
            report = report_or_warning(self.folder)
        self.display.summary(result, report)
        return result

    def _save(self) -> None:
        self.checkpoints.save(self.policy.steps, self.policy.model_snapshot(), self._state.snapshot())
        self._saved_step = self.policy.steps

    def _validate(self, step: int) -> Accuracy | None:
        """Greedy accuracy on the held-out questions, shown and logged; None without any, or if the check of an
        answer failed that must not."""
        if not self.held_out:
            return None
        with phase("validation"):
            accuracy, answers = validate(
                self.held_out, self.model, self.ranks, self.config.rollout.max_new_tokens, keep=KEPT_ANSWERS
            )
        if self._failure():
            return None
        self.display.validated(step, accuracy, self.config.data.validation, self._since_validation())
        self.directory.log_validation(step, accuracy)
        if self.config.run.save_completions:
            self.directory.write_validation(step, answers)
        return accuracy

    def _since_validation(self) -> list[dict[str, Any]]:
        """The rows of the steps since the last validation, the running step's included."""
        rows = [*self.metrics, self._row] if self._row else self.metrics
        before = [number for number, row in enumerate(rows, start=1) if row.get("val_accuracy") is not None]
        return rows[before[-1] if before else 0 :]


def load_held_out(config: Config) -> list[Query]:
    """The validation questions: the first `validation.size` of a seeded shuffle, the same ones at every seed.

    Categories that `data.category_weights` leaves out of training are left out here, too.
    """
    if config.data.validation is None:
        return []
    queries = load_queries(as_files(config.data, "validation"), "validation", most=config.validation.size)
    random.Random(0).shuffle(queries)
    trained = {name for name, weight in config.data.category_weights.items() if weight > 0}
    queries = [query for query in queries if category_of(query) in trained] or queries
    return queries[: config.validation.size]


def return_free_memory() -> None:
    """Hand glibc's free pages to the operating system: batches differ in size, so the heap fills with gaps (50 MB after
    150 steps of the tiny run)."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
