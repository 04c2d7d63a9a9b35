"""The figures of the page in their order, with what to say beside each, and in place of one that cannot be drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rethinker.report import figures
from rethinker.report.figures import Runs


@dataclass(frozen=True)
class ReportFigure:
    """One figure of the page."""

    name: str
    """Of its file, `<name>.svg`."""
    title: str
    meaning: str
    """What the reader sees in it."""
    missing: str
    """Why it is not there, where `draw` returns None."""
    draw: Callable[[Runs], Any]


FIGURES = (
    ReportFigure(
        "validation",
        "Held-out accuracy",
        "Greedy answers to held-out questions, judged by the training reward. Step 0 is before training.",
        "No run has validated yet, or data.validation is null.",
        figures.validation_curves,
    ),
    ReportFigure(
        "reward",
        "Sampled reward",
        "Mean reward of each step's fresh responses, as a moving average.",
        "No run has logged a reward.",
        figures.rewards,
    ),
    ReportFigure(
        "effective_queries",
        "Effective queries",
        "Share of queries whose responses are neither all right nor all wrong. Only these carry an advantage; as the "
        "share falls, plain GRPO trains on less and less.",
        "No run has logged effective_query_ratio.",
        figures.effective_queries,
    ),
    ReportFigure(
        "advantages",
        "Training advantages",
        "Trained pairs by the size of their advantage, over the whole run. Pairs at 0 teach nothing. "
        "Filtering drops them, and replay draws large advantages more often.",
        "No run has logged advantage_histogram.",
        figures.advantages,
    ),
    ReportFigure(
        "replay",
        "Selective Sample Replay",
        "Share of the batch that comes from replay, samples in the buffer, and the mean age of the drawn samples in "
        "optimizer steps.",
        "None of these runs replays samples; algorithm.name: ssr does.",
        figures.replay,
    ),
    ReportFigure(
        "response_length",
        "Response length",
        "Mean tokens per sampled response. Below it, where that ever reaches 1%: the share that rethinks unforced.",
        "No run has logged response_length_mean.",
        figures.response_lengths,
    ),
    ReportFigure(
        "policy",
        "Entropy, clipping and KL",
        "Clipped tokens are those whose ratio left the clip range, above or below. The KL from trainer to rollout "
        "engine is taken right after a weight sync: it should stay at rounding error.",
        "No run has logged these metrics.",
        figures.policy_health,
    ),
    ReportFigure(
        "time",
        "Time per step",
        "Seconds per optimizer step by phase. Other is validation, checkpoints and choosing the batch.",
        "No run has logged its times.",
        figures.phase_times,
    ),
)
