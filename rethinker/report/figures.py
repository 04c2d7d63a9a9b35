"""The figures of the page in their order, from the metrics of one run or of several side by side.

A `draw` takes the runs and returns a matplotlib figure, or None where no run has what it shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from rethinker.report.drawing import COLORS, MARKERS, draw_runs, label_of, legend, new_figure, style_of, whole_steps
from rethinker.report.runs import RunRecord
from rethinker.runtime.profiling import PHASES

Runs = Sequence[RunRecord]
WIDTH = 5.2  # inches: on a phone's 390 px the labels are still 8 px high
ADVANTAGES = ("0", "0 to 0.5", "0.5 to 1", "1 to 1.5", "1.5 to 2", "above 2")
"""The bins of `advantage_histogram` in words (algorithm/selection.py: ADVANTAGE_BINS)."""


@dataclass(frozen=True)
class ReportFigure:
    """One figure of the page."""

    name: str  # of its file, <name>.svg
    title: str
    meaning: str  # what the reader sees in it
    missing: str  # why it is not there, where `draw` returns None
    metric: str  # whose first and last value describe it to those who cannot see it
    draw: Callable[[Runs], Any]


def curves(runs: Sequence[RunRecord | None], panels: dict[str, str], share: bool = False) -> Any | None:
    """Metrics over steps, a line per run, in panels below one another.

    Args:
        runs: None keeps the colour of its place free.
        panels: {metric: label of its axis}; without the first metric there is no figure.
        share: whether the first one lies between 0 and 1.
    """
    figure = new_figure(WIDTH, (3.2, 4.4, 5.0)[len(panels) - 1])
    axes = np.atleast_1d(figure.subplots(len(panels), 1, sharex=True))
    drawn = [draw_runs(panel, runs, metric) for panel, metric in zip(axes, panels, strict=True)]
    if not drawn[0]:
        return None
    for panel, label in zip(axes, panels.values(), strict=True):
        panel.set_ylabel(label)
    if share:
        axes[0].set_ylim(-0.03, 1.03)
    whole_steps(axes[-1])
    legend(axes[0])
    return figure


def validation_curves(runs: Runs) -> Any | None:
    """Greedy accuracy on held-out questions, each run's last value written beside its last point."""
    figure = new_figure(WIDTH, 3.2)
    axes = figure.subplots()
    ends = []
    for number, run in enumerate(runs):
        steps, values = run.series("val_accuracy")
        if steps.size:
            marker = {"marker": MARKERS[number % len(MARKERS)], "markersize": 4.5, "linewidth": 1.6}
            axes.plot(steps, values, label=label_of(run.label), **style_of(number) | marker)
            ends.append((values[-1], steps[-1], style_of(number)["color"]))
    if not ends:
        return None
    low, high = axes.get_ylim()
    height = -np.inf
    for value, step, color in sorted(ends):  # moved apart so that none covers another
        height = max(value, height + (high - low) * 0.055)
        at = {"textcoords": "offset points", "xytext": (7, 0), "ha": "left", "va": "center"}
        axes.annotate(f"{value:.3f}", (step, height), color=color, fontsize=8.5, fontweight="bold", **at)
    axes.margins(x=0.1, y=0.1)
    axes.set_ylabel("greedy accuracy (0 to 1)")
    whole_steps(axes)
    legend(axes)
    return figure


def response_lengths(runs: Runs) -> Any | None:
    """Mean length of the sampled responses; below it, where that ever reaches 1%, how many rethink unforced."""
    panels = {"response_length_mean": "tokens per response"}
    if any(run.series("rethink_ratio")[1].max(initial=0) >= 0.01 for run in runs):
        panels["rethink_ratio"] = "share that rethinks"
    figure = curves(runs, panels)
    if figure and len(panels) > 1:
        figure.axes[1].set_ylim(bottom=0)
    return figure


def advantages(runs: Runs) -> Any | None:
    """Per cent of the trained samples by the size of their advantage, over the whole run."""
    found = []
    for number, run in enumerate(runs):
        counts = [row.get("advantage_histogram") or () for row in run.steps]
        counts = np.sum([row for row in counts if len(row) == len(ADVANTAGES)], axis=0, dtype=float)  # [bins]
        if counts.sum():
            found.append((number, run, 100 * counts / counts.sum()))
    if not found:
        return None
    figure = new_figure(WIDTH, 3.2)
    axes = figure.subplots()
    width = 0.8 / len(found)
    places = np.arange(len(ADVANTAGES))
    for place, (number, run, shares) in enumerate(found):
        at = places + (place - (len(found) - 1) / 2) * width
        bars = axes.bar(at, shares, width * 0.92, color=style_of(number)["color"], label=label_of(run.label))
        if len(found) <= 3:
            axes.bar_label(bars, [f"{share:.0f}" for share in shares], fontsize=7.5, padding=1)
    axes.set_xticks(places, ADVANTAGES)
    axes.set_xlabel("size of the advantage, |A|")
    axes.set_ylabel("trained pairs, %")
    axes.margins(y=0.12)
    legend(axes)
    return figure


def replay(runs: Runs) -> Any | None:
    """Selective Sample Replay, of the runs that replay: share of the batch, samples in the buffer, age of the draws."""
    panels = {"replay_fraction": "share of the batch", "replay_size": "samples in the buffer"}
    panels["replay_age_mean"] = "age of draws\n(steps)"
    return curves([run if run.has("replay_size") else None for run in runs], panels, share=True)


def policy_health(runs: Runs) -> Any | None:
    """Entropy, clipped tokens, KL to the behaviour policy, mismatch with the rollout engine, gradient norm, loss."""
    panels = {
        "entropy": "entropy (nats)",
        "clip_fraction_high": "clipped tokens",
        "old_kl": "KL to behaviour policy",
        "mismatch_kl": "KL trainer to rollout",
        "grad_norm": "gradient norm",
        "loss": "loss",
    }
    if any(run.has("kl") for run in runs):
        panels["kl"] = "KL to reference"
    figure = new_figure(WIDTH, 1.9 * ((len(panels) + 1) // 2))
    grid = figure.subplots((len(panels) + 1) // 2, 2, sharex=True).ravel()
    drawn = []
    for axes, (metric, title) in zip(grid, panels.items(), strict=False):
        axes.set_title(title, loc="left", fontsize=9)
        if metric == "clip_fraction_high":
            drawn.append(draw_runs(axes, runs, metric, " above", linestyle="-"))
            drawn.append(draw_runs(axes, runs, "clip_fraction_low", " below", linestyle=":"))
        else:
            drawn.append(draw_runs(axes, runs, metric))
        if metric == "mismatch_kl":
            axes.yaxis.get_major_formatter().set_powerlimits((-2, 4))
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[-2:]:
        whole_steps(axes)
    for axes in grid[: 2 if len(runs) == 1 else 1]:
        legend(axes, fontsize=8)
    return figure if any(drawn) else None


def phase_times(runs: Runs) -> Any | None:
    """Seconds per optimizer step by phase: over the steps of one run, or the mean of each of several."""
    shares = [_phases(run) for run in runs]
    names = [name for name in (*PHASES, "other") if any((phases[name] > 0).any() for phases in shares)]
    if not names:
        return None
    colors = dict(zip(PHASES, COLORS, strict=False)) | {"other": "#bbbbbb"}
    alone = len(runs) == 1
    figure = new_figure(WIDTH, 3.2 if alone else 1.3 + 0.4 * len(runs))
    axes = figure.subplots()
    if alone:
        stretches = np.array_split(np.arange(len(runs[0].steps)), min(40, len(runs[0].steps)))
        places = np.array([np.mean([runs[0].steps[i]["step"] for i in s]) for s in stretches])
        heights = {name: np.array([shares[0][name][s].mean() for s in stretches]) for name in names}
        widths, draw, start = np.array([len(s) for s in stretches]) * 0.9, axes.bar, "bottom"
        axes.set_ylabel("seconds per step")
        whole_steps(axes)
    else:
        places, widths, draw, start = np.arange(len(runs)), 0.7, axes.barh, "left"
        heights = {name: np.array([phases[name].mean() for phases in shares]) for name in names}
        axes.set_yticks(places, [label_of(run.label) for run in runs])
        axes.invert_yaxis()
        axes.set_xlabel("seconds per step, mean over the run")
    base = np.zeros(len(places))
    for name in names:
        draw(places, heights[name], widths, color=colors[name], label=name, **{start: base})
        base = base + heights[name]
    figure.legend(loc="outside upper left", ncols=4, fontsize=8.5, frameon=False, handlelength=1.2)
    return figure


def _phases(run: RunRecord) -> dict[str, np.ndarray]:
    """Seconds of each step by phase, [steps] each; `other` is the rest of step_s."""
    phases = {name: np.array([float(row.get(f"time_{name}_s") or 0) for row in run.steps]) for name in PHASES}
    whole = np.array([float(row.get("step_s") or 0) for row in run.steps])
    return phases | {"other": np.maximum(0, whole - sum(phases.values()))}


FIGURES = (
    ReportFigure(
        "validation",
        "Held-out accuracy",
        "Greedy answers to held-out questions, judged by the training reward. Step 0 is before training.",
        "No run has validated yet, or data.validation is null.",
        "val_accuracy",
        validation_curves,
    ),
    ReportFigure(
        "reward",
        "Sampled reward",
        "Mean reward of each step's fresh responses, as a moving average.",
        "No run has logged a reward.",
        "reward_mean",
        partial(curves, panels={"reward_mean": "sampled reward"}),
    ),
    ReportFigure(
        "effective_queries",
        "Effective queries",
        "Share of queries whose responses are neither all right nor all wrong. Only these carry an advantage; as the "
        "share falls, plain GRPO trains on less and less.",
        "No run has logged effective_query_ratio.",
        "effective_query_ratio",
        partial(curves, panels={"effective_query_ratio": "effective queries (0 to 1)"}, share=True),
    ),
    ReportFigure(
        "advantages",
        "Training advantages",
        "Trained pairs by the size of their advantage, over the whole run. Pairs at 0 teach nothing. "
        "Filtering drops them, and replay draws large advantages more often.",
        "No run has logged advantage_histogram.",
        "",
        advantages,
    ),
    ReportFigure(
        "replay",
        "Selective Sample Replay",
        "Share of the batch that comes from replay, samples in the buffer, and the mean age of the drawn samples in "
        "optimizer steps.",
        "None of these runs replays samples; algorithm.name: ssr does.",
        "replay_fraction",
        replay,
    ),
    ReportFigure(
        "response_length",
        "Response length",
        "Mean tokens per sampled response. Below it, where that ever reaches 1%: the share that rethinks unforced.",
        "No run has logged response_length_mean.",
        "response_length_mean",
        response_lengths,
    ),
    ReportFigure(
        "policy",
        "Entropy, clipping and KL",
        "Clipped tokens are those whose ratio left the clip range, above or below. The KL from trainer to rollout "
        "engine is taken right after a weight sync: it should stay at rounding error.",
        "No run has logged these metrics.",
        "entropy",
        policy_health,
    ),
    ReportFigure(
        "time",
        "Time per step",
        "Seconds per optimizer step by phase. Rethink is the second pass of forced rethinking; other is validation "
        "and choosing the batch.",
        "No run has logged its times.",
        "step_s",
        phase_times,
    ),
)
