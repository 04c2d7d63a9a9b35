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
import shutil
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
from rethinker.config import Config, ConfigError
from rethinker.evaluation.rethinking import rethinks
from rethinker.evaluation.validation import Accuracy, validate
from rethinker.policy.engine import PolicyEngine
from rethinker.policy.model import load_processor
from rethinker.policy.throughput import model_flops_utilization, peak_memory_gb
from rethinker.report.learning import learning_curve
from rethinker.report.page import report_or_warning
from rethinker.rollout import RolloutEngine, make_engine
from rethinker.rollout.rethinking import Rethinker, make_triggers, released_reward
from rethinker.runtime import distributed
from rethinker.runtime.display import Display
from rethinker.runtime.distributed import Ranks
from rethinker.runtime.ownership import collect, share
from rethinker.runtime.profiling import StepProfiler, phase
from rethinker.runtime.run_directory import RunDirectory
from rethinker.samples import Completion, Group, Query
from rethinker.settings import load_config
from rethinker.tasks.datasets import QueryStream, load_queries
from rethinker.tasks.images import check_images
from rethinker.tasks.prompts import PromptEncoder, select_fitting
from rethinker.tasks.reward import AnswerChecker


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
    """
    G, N = config.rollout.group_size, config.train.batch_pairs
    queries = load_queries(config.data, "train")
    held_out = load_held_out(config)
    check_images([*queries, *held_out])
    total_steps = schedule_length(config, len(queries))
    ranks = distributed.start(config.rollout.timeout_s)
    config.run.name = ranks.broadcast(config.run.name)  # its default holds the time, which ranks may read differently
    seed_everything(config.seed)

    with ExitStack() as stack:
        stack.callback(distributed.stop)
        run = stack.enter_context(RunDirectory(config, enabled=ranks.is_main))
        model_dir = initial_model(config, ranks)
        encoder = PromptEncoder(load_processor(model_dir), config.data)
        held_out, _ = select_fitting(held_out, encoder)
        stream = QueryStream(queries, seed=config.seed, category_weights=config.data.category_weights)
        policy = PolicyEngine(config, model_dir, encoder, ranks, total_steps)
        rollout = make_engine(
            config, str(model_dir), rank=ranks.rank, world_size=ranks.world_size, local_rank=ranks.local_rank
        )
        stack.callback(rollout.close)
        checker = stack.enter_context(AnswerChecker(config.reward))
        rethinker = make_rethinker(config, encoder)
        replay = ReplayBuffer(config.replay, config.seed)
        display = stack.enter_context(Display(total_steps, enabled=ranks.is_main))
        profiler = StepProfiler(config.profile.steps, run.folder)
        stack.callback(profiler.close)

        metrics: list[dict[str, Any]] = []
        before = after = best = held_out_accuracy(held_out, rollout, encoder, checker, ranks, config)
        display.validated(0, before)
        run.log_validation(0, before)
        episode, generated, clock, times = 0, 0, time.perf_counter(), {}
        budget = config.train.max_generated_tokens or math.inf
        while policy.steps < total_steps and generated < budget:
            with phase("rollout", times):
                asked = [encoder.fitting(stream) for _ in range(config.train.episode_queries)]
                groups = roll_out(asked, episode, policy.version, rollout, encoder, config, ranks)
            with phase("reward", times):
                judge(groups, checker, config)
            if rethinker:
                with phase("rethink", times):
                    rethink(groups, rethinker, episode, rollout, encoder, checker, config, ranks)
            note_rethinking(groups, config)
            groups = share(groups, asked, first_number=episode * len(asked), ranks=ranks)
            generated += sum(group.sampled_tokens for group in groups)
            failures = sum(ranks.gather(checker.failures.total()))
            assign_advantages(groups, config.algorithm.advantage_scale)
            if rethinker and rethinker.needs_scores:
                rescore(groups, policy)
            if config.algorithm.rollout_correction is not None:
                policy.score([sample for group in groups for sample in group.samples()])
            if config.run.save_completions:
                run.write_completions(episode, collect(groups, ranks))

            rollout.sleep()
            steps = [groups[i : i + N // G] for i in range(0, len(groups), N // G)][: total_steps - policy.steps]
            for number, fresh in enumerate(steps, start=1):
                batch = select_batch(fresh, name=config.algorithm.name, pairs=N, replay=replay)
                with phase("train", times), profiler.step(policy.steps + 1):
                    update = policy.train_step(batch.samples)
                if number == 1:  # the policy has not moved since the sync: trainer and rollout differ by rounding alone
                    mismatch = update["old_kl"]
                row = describe(policy.steps, episode, fresh, update) | batch.metrics(replay)
                row |= {"mismatch_kl": mismatch, "failed_checks": failures, "left_out_queries": encoder.dropped.total()}
                row["generated_tokens"] = generated
                if number == len(steps):
                    with phase("sync", times):
                        policy.version += 1
                        rollout.sync(policy.weights, policy.version)
                    replay.end_episode(policy.version)
                    ends = policy.steps == total_steps or generated >= budget
                    if ends or (episode + 1) % config.validation.every == 0:
                        after = held_out_accuracy(held_out, rollout, encoder, checker, ranks, config)
                        display.validated(policy.steps, after)
                        run.log_validation(policy.steps, after)
                        if after and after.overall > best.overall:
                            best = after
                            save(policy, run.folder / "checkpoints" / "best")
                        row["val_accuracy"] = after and after.overall
                if config.checkpoint.every and policy.steps % config.checkpoint.every == 0:
                    save(policy, run.folder / "checkpoints" / f"step_{policy.steps:06d}")
                now = time.perf_counter()
                row |= measure(update, policy, times, now - clock)
                clock, times = now, {}
                metrics.append(row)
                run.log(row)
                display.step(row)
            episode += 1

        save(policy, run.folder / "checkpoints" / "last")
        report = None
        if ranks.is_main:
            learning_curve([run.folder], run.folder / "learning.png")
            report = report_or_warning(run.folder)
        improved = best is not before
        result = Run(run.folder, metrics, run.folder / "checkpoints" / ("best" if improved else "last"), before, after)
        display.summary(result, report)
    return result


def roll_out(
    queries: list[Query],
    episode: int,
    version: int,
    rollout: RolloutEngine,
    encoder: PromptEncoder,
    config: Config,
    ranks: Ranks,
) -> list[Group]:
    """This rank's share of the episode's groups: every world_size-th query, G responses each."""
    mine = queries[ranks.rank :: ranks.world_size]
    prompts = [encoder.encode(query) for query in mine]
    answers = rollout.generate(
        prompts,
        n=config.rollout.group_size,
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=config.rollout.temperature,
        seed=episode_seed(config, episode, ranks),
    )
    return [
        Group(query, completions, version, len(prompt.token_ids), sampled_tokens=sum(c.tokens for c in completions))
        for query, prompt, completions in zip(mine, prompts, answers, strict=True)
    ]


def episode_seed(config: Config, episode: int, ranks: Ranks, stream: int = 0) -> int:
    """A seed of its own for every episode, rank and stream of random numbers."""
    streams = [config.seed, episode, ranks.rank] + [stream] * (stream > 0)
    return int(np.random.SeedSequence(streams).generate_state(1)[0])


def rethink(
    groups: list[Group],
    rethinker: Rethinker,
    episode: int,
    rollout: RolloutEngine,
    encoder: PromptEncoder,
    checker: AnswerChecker,
    config: Config,
    ranks: Ranks,
) -> None:
    """Second passes over a share of this rank's responses; see Rethinker.force."""
    prompts = [encoder.encode(group.query) for group in groups]
    seed = episode_seed(config, episode, ranks, stream=1)
    rethinker.force(groups, prompts, rollout, lambda trials: judge(trials, checker, config), seed)


def note_rethinking(groups: list[Group], config: Config) -> None:
    """Set `group.rethinks`: which responses rethink of their own accord."""
    for group in groups:
        forced = [c.rethought and config.rethink.triggers.get(c.rethought.name) for c in group.completions]
        group.rethinks = [rethinks(c.text, phrase or "") for c, phrase in zip(group.completions, forced, strict=True)]


def make_rethinker(config: Config, encoder: PromptEncoder) -> Rethinker | None:
    """Forced rethinking as `rethink` says; None where it is off."""
    if config.rethink.fraction == 0:
        return None
    return Rethinker(
        config.rethink,
        make_triggers(encoder.tokenizer, config.rethink.triggers),
        encoder.decode,
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=config.rollout.temperature,
    )


def rescore(groups: list[Group], policy: PolicyEngine) -> None:
    """Give rethought responses the behaviour log-probs of the policy's own forward (collective)."""
    rethought = [sample for group in groups for sample in group.samples() if sample.completion.supervised]
    policy.score(rethought)
    for sample in rethought:
        if isinstance(sample.completion, Completion):
            sample.completion.logprobs = sample.completion.trainer_logprobs


def judge(groups: list[Group], checker: AnswerChecker, config: Config) -> None:
    """Give every completion the reward of its own final text; requests carry ids, so order does not matter."""
    requests = {
        f"{g}/{i}": (completion.text, group.query)
        for g, group in enumerate(groups)
        for i, completion in enumerate(group.completions)
    }
    rewards = checker.score([(key, text, query) for key, (text, query) in requests.items()])
    for g, group in enumerate(groups):
        group.rewards = [rewards[f"{g}/{i}"] for i in range(len(group.completions))]
        if config.rethink.fraction > 0 and config.rethink.preset == "released_code":
            group.rewards = list(map(released_reward, group.rewards, group.completions))


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


def describe(step: int, episode: int, fresh: list[Group], update: dict[str, float]) -> dict[str, Any]:
    """The step's metrics that do not depend on the clock; rewards and lengths are those of the fresh rollouts.

    `rethink_*` are shares of the step's responses.
    """
    responses = sum(len(group.completions) for group in fresh)
    return {
        "step": step,
        "episode": episode,
        "reward_mean": float(np.mean([reward for group in fresh for reward in group.rewards])),
        "response_length_mean": float(np.mean([c.tokens for group in fresh for c in group.completions])),
        "rethink_ratio": float(np.mean([cue for group in fresh for cue in group.rethinks])),
        **{
            f"rethink_{what}": sum(getattr(group.rethinking, what) for group in fresh) / responses
            for what in ("forced", "kept", "fixed", "broken")
        },
        "val_accuracy": None,
        **update,
    }


def measure(update: dict[str, float], policy: PolicyEngine, times: dict[str, float], step_s: float) -> dict[str, Any]:
    """The step's speed: seconds since the last step by phase, tokens/s and MFU of training, memory."""
    seconds = {
        f"time_{name}_s": times.get(f"time_{name}_s", 0.0) for name in ("rollout", "reward", "rethink", "train", "sync")
    }
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
    queries = load_queries(config.data, "validation")
    random.Random(0).shuffle(queries)
    return queries[: config.validation.size]


def schedule_length(config: Config, queries: int) -> int:
    """Optimizer steps of the run: train.max_steps, or what train.epochs amounts to."""
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
    if config.policy.model != "tiny":
        return Path(config.policy.model)
    from rethinker.policy.warmup import warmed_up_tiny

    return ranks.broadcast(warmed_up_tiny(config.policy.warmup, config.data) if ranks.is_main else None)


def save(policy: PolicyEngine, folder: Path) -> None:
    """Write the policy to `folder`, whole or not at all: a reader never sees a half-written checkpoint."""
    partial = folder.with_name(f".{folder.name}.partial")
    policy.save(partial)
    if policy.ranks.is_main:
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)


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
