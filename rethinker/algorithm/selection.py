"""Which samples a step trains on: all of them (grpo), the effective ones (filter), or those and replay (ssr)."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

from rethinker.algorithm.replay import ReplayBuffer
from rethinker.config import Config
from rethinker.samples import Group, Sample

ADVANTAGE_BINS = (-1.0, 0.0, 0.5, 1.0, 1.5, 2.0, math.inf)
"""Edges of `advantage_histogram`, which counts a step's samples: low < |A| <= high, the first bin exact zeros."""


@dataclass(frozen=True)
class Batch:
    """The samples of one optimizer step, over all ranks: those of its rollouts, then `replayed` draws."""

    samples: list[Sample]
    replayed: int
    effective_query_ratio: float
    dropped_by_advantage: float = 0.0

    @property
    def draws(self) -> list[Sample]:
        """Those that replay drew."""
        return self.samples[len(self.samples) - self.replayed :]

    def metrics(self, replay: ReplayBuffer) -> dict[str, Any]:
        """What the step trains on, by its advantages (ADVANTAGE_BINS), and the state of the buffer it drew from."""
        advantages = np.array([sample.advantage for sample in self.samples])
        weighted = advantages * [sample.weight for sample in self.samples]
        sizes = np.abs(advantages)
        return {
            "effective_query_ratio": self.effective_query_ratio,
            "dropped_by_advantage": self.dropped_by_advantage,
            "trained_pairs": len(self.samples),
            "replay_fraction": self.replayed / max(1, len(self.samples)),
            "replay_size": len(replay),
            "replay_age_mean": replay.drawn_age_mean,
            "advantage_mean": float(weighted.mean()) if self.samples else 0.0,
            "advantage_abs_mean": float(sizes.mean()) if self.samples else 0.0,
            "advantage_histogram": [
                int(((sizes > low) & (sizes <= high)).sum()) for low, high in itertools.pairwise(ADVANTAGE_BINS)
            ],
        }


def teaches(group: Group, mask_truncated: bool = False) -> bool:
    """Whether the group is effective, and with `mask_truncated` some response of it is trained on."""
    return group.effective and not (mask_truncated and all(group.truncated))


def select_batch(groups: list[Group], replay: ReplayBuffer, config: Config, progress: float = 0.0) -> Batch:
    """Choose the samples of one step (VL-Rethinker: Vanishing advantages, Selective Sample Replay).

    Of the step's groups, over all ranks, `algorithm.name` grpo keeps every sample, filter those with |A| > 0 and below
    algorithm.max_advantage (PAD, arXiv 2506.04207); ssr puts these into `replay` and then draws from it what
    train.batch_pairs lacks; an empty buffer leaves the batch smaller. With train.mask_truncated a response that the
    longest length ended is in no batch (DAPO, arXiv 2503.14476, section 3.4).

    `progress`, the share of the run that is done, is for replay.importance_exponent_end.
    """
    name, highest = config.algorithm.name, config.algorithm.max_advantage
    samples = [sample for group in groups for sample in group.samples()]
    if config.train.mask_truncated:
        cut = [truncated for group in groups for truncated in group.truncated]
        samples = [sample for sample, truncated in zip(samples, cut, strict=True) if not truncated]
    draws: list[Sample] = []
    dropped = 0.0
    if name != "grpo":
        below = samples
        if highest is not None:
            below = [sample for sample in samples if not abs(sample.advantage) >= highest]  # replay refuses NaN
        dropped = (len(samples) - len(below)) / max(1, sum(sample.advantage != 0 for sample in samples))
        samples = [sample for sample in below if sample.advantage != 0]
        if name == "ssr":
            replay.forget({group.query.id for group in groups})  # of a group that is cut whole `add` hears nothing
            replay.add(below)  # which drops zero advantages, too, but learns from them which queries are solved
            draws = replay.draw(max(0, config.train.batch_pairs - len(samples)), progress)
    effective = sum(group.effective for group in groups) / max(1, len(groups))
    return Batch(samples + draws, len(draws), effective, dropped)


def category_metrics(fresh: list[Group], draws: list[Sample]) -> dict[str, dict[str, float]]:
    """By `Query.category`: mean reward of the step's own responses, share of its queries, and share of replay's draws;
    empty where the step's queries are all of one category."""
    rewards = defaultdict(list)
    for group in fresh:
        rewards[group.query.category] += group.rewards
    several = len(rewards) > 1
    return {
        "reward_by_category": {name: float(np.mean(rewards[name])) for name in sorted(rewards)} if several else {},
        "queries_by_category": _shares([group.query.category for group in fresh]) if several else {},
        "replay_by_category": _shares([sample.query.category for sample in draws]) if several else {},
    }


def function_metrics(fresh: list[Group]) -> dict[str, dict[str, float]]:
    """By reward function: mean and standard deviation of its values for the step's own responses, and the share of
    groups in which they differ; empty with a single function."""
    names = list(fresh[0].scores) if fresh and len(fresh[0].scores) > 1 else []
    values = {name: [group.scores[name] for group in fresh] for name in names}  # [group][completion]
    return {
        "reward_by_function": {name: float(np.mean(np.concatenate(of))) for name, of in values.items()},
        "reward_std_by_function": {name: float(np.std(np.concatenate(of))) for name, of in values.items()},
        "reward_differs_by_function": {
            name: sum(max(group) != min(group) for group in of) / len(of) for name, of in values.items()
        },
    }


def environment_metrics(fresh: list[Group], config: Config) -> dict[str, Any]:
    """Turns and tool calls of a response, and failures of a response by their reasons; null without an environment."""
    if not config.environment.use:
        return {"turns_mean": None, "tool_calls_mean": None, "tool_use_ratio": None, "environment_failures": {}}
    calls = [number for group in fresh for number in group.calls]
    failures = sum((Counter(group.failures) for group in fresh), Counter())
    return {
        "turns_mean": float(np.mean([number for group in fresh for number in group.turns])),
        "tool_calls_mean": float(np.mean(calls)),
        "tool_use_ratio": float(np.mean([number > 0 for number in calls])),
        "environment_failures": {reason: failures[reason] / len(calls) for reason in sorted(failures)},
    }


def _shares(names: list[str]) -> dict[str, float]:
    counts = Counter(names)
    return {name: counts[name] / len(names) for name in sorted(counts)}
