"""Figures of the report, one function each, from the metrics of one run or of several side by side.

A function takes the runs and returns a matplotlib figure, or None where no run has what it shows; contents.py says what
stands beside each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rethinker.report.drawing import (
    COLORS,
    MARKERS,
    draw_runs,
    label_of,
    legend,
    new_figure,
    style_of,
    whole_steps,
)
from rethinker.report.runs import RunRecord

Runs = Sequence[RunRecord]

ADVANTAGES = ("0", "0 to 0.5", "0.5 to 1", "1 to 1.5", "1.5 to 2", "above 2")
"""The bins of `advantage_histogram` in words (algorithm/selection.py: ADVANTAGE_BINS)."""

PHASES = ("rollout", "reward", "train", "sync")
WIDTH = 5.2  # inches: on a phone's 390 px the labels are still 8 px high


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
            ends.append((steps[-1], values[-1], style_of(number)["color"]))
    if not ends:
        return None
    _write_ends(axes, ends)
    axes.margins(x=0.1, y=0.1)
    axes.set_ylabel("greedy accuracy (0 to 1)")
    whole_steps(axes)
    legend(axes)
    return figure


def _write_ends(axes: Any, ends: list[tuple[float, float, str]]) -> None:
    """The last values in the colours of their lines, moved apart so that none covers another."""
    low, high = axes.get_ylim()
    gap, height = (high - low) * 0.055, -np.inf
    for step, value, color in sorted(ends, key=lambda end: end[1]):
        height = max(value, height + gap)
        at = {"textcoords": "offset points", "xytext": (7, 0), "ha": "left", "va": "center"}
        axes.annotate(f"{value:.3f}", (step, height), color=color, fontsize=8.5, fontweight="bold", **at)


def rewards(runs: Runs) -> Any | None:
    """Mean reward of the sampled responses."""
    return _curves(runs, "reward_mean", "sampled reward")


def response_lengths(runs: Runs) -> Any | None:
    """Mean length of the sampled responses; below it, where that ever reaches 1%, how many rethink unforced."""
    rethink = any(run.series("rethink_ratio")[1].max(initial=0) >= 0.01 for run in runs)
    figure = new_figure(WIDTH, 4.4 if rethink else 3.2)
    panels = np.atleast_1d(figure.subplots(2 if rethink else 1, 1, sharex=True))
    drawn = draw_runs(panels[0], runs, "response_length_mean")
    panels[0].set_ylabel("tokens per response")
    if rethink:
        draw_runs(panels[1], runs, "rethink_ratio")
        panels[1].set_ylim(bottom=0)
        panels[1].set_ylabel("share that rethinks")
    whole_steps(panels[-1])
    legend(panels[0])
    return figure if drawn else None


def effective_queries(runs: Runs) -> Any | None:
    """Share of queries whose rewards differ, the only ones with a gradient (METHOD: Vanishing advantages)."""
    figure = _curves(runs, "effective_query_ratio", "effective queries (0 to 1)")
    if figure is not None:
        figure.axes[0].set_ylim(-0.03, 1.03)
    return figure


def advantages(runs: Runs) -> Any | None:
    """Per cent of the trained samples by the size of their advantage, over the whole run."""
    counted = [(n, run, _histogram(run)) for n, run in enumerate(runs)]
    counted = [(n, run, 100 * counts / counts.sum()) for n, run, counts in counted if counts.sum()]
    if not counted:
        return None
    figure = new_figure(WIDTH, 3.2)
    axes = figure.subplots()
    width = 0.8 / len(counted)
    places = np.arange(len(ADVANTAGES))
    for place, (number, run, shares) in enumerate(counted):
        at = places + (place - (len(counted) - 1) / 2) * width
        bars = axes.bar(at, shares, width * 0.92, color=style_of(number)["color"], label=label_of(run.label))
        if len(counted) <= 3:
            axes.bar_label(bars, [f"{share:.0f}" for share in shares], fontsize=7.5, padding=1)
    axes.set_xticks(places, ADVANTAGES)
    axes.set_xlabel("size of the advantage, |A|")
    axes.set_ylabel("trained pairs, %")
    axes.margins(y=0.12)
    legend(axes)
    return figure


def _histogram(run: RunRecord) -> np.ndarray:
    """Trained samples per bin over all steps, [bins]; zeros without any."""
    counts = [row["advantage_histogram"] for row in run.steps if row.get("advantage_histogram")]
    counts = [row for row in counts if len(row) == len(ADVANTAGES)]
    return np.sum(counts, axis=0, dtype=float) if counts else np.zeros(len(ADVANTAGES))


def replay(runs: Runs) -> Any | None:
    """Selective Sample Replay: share of the batch that it fills, samples in the buffer, age of the drawn ones."""
    runs = [run if run.has("replay_size") else None for run in runs]
    if not any(runs):
        return None
    figure = new_figure(WIDTH, 5.0)
    panels = figure.subplots(3, 1, sharex=True)
    names = ("replay_fraction", "replay_size", "replay_age_mean")
    labels = ("share of the batch", "samples in the buffer", "age of draws\n(steps)")
    for axes, name, label in zip(panels, names, labels, strict=True):
        _draw_kept(axes, runs, name)
        axes.set_ylabel(label)
    panels[0].set_ylim(-0.03, 1.03)
    whole_steps(panels[-1])
    legend(panels[0])
    return figure


def _draw_kept(axes: Any, runs: Sequence[RunRecord | None], metric: str) -> None:
    """Lines of the runs that are not None, in the colours of their places."""
    kept = [run for run in runs if run]
    for number, run in enumerate(runs):
        if run:
            draw_runs(axes, [run], metric, **style_of(number) | ({"linewidth": 1.4} if len(kept) > 1 else {}))


def policy_health(runs: Runs) -> Any | None:
    """Entropy, clipped tokens, KL to the behaviour policy, mismatch with the rollout engine, gradient norm, loss."""
    panels = {
        "entropy": "entropy (nats)",
        "clip": "clipped tokens",
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
        if metric == "clip":
            high = draw_runs(axes, runs, "clip_fraction_high", " above", linestyle="-")
            low = draw_runs(axes, runs, "clip_fraction_low", " below", linestyle=":")
            drawn.append(high or low)
        else:
            drawn.append(draw_runs(axes, runs, metric))
        if metric == "mismatch_kl":
            axes.yaxis.get_major_formatter().set_powerlimits((-2, 4))
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[-2:]:
        whole_steps(axes)
    legend(grid[0], fontsize=8)
    if len(runs) == 1:
        legend(grid[1], fontsize=8)
    return figure if any(drawn) else None


def phase_times(runs: Runs) -> Any | None:
    """Seconds per optimizer step by phase: over the steps of one run, or the mean of each of several."""
    shares = [_phases(run) for run in runs]
    names = [name for name in (*PHASES, "other") if any((phases.get(name, np.zeros(1)) > 0).any() for phases in shares)]
    if not names:
        return None
    colors = dict(zip((*PHASES, "other"), (COLORS[0], COLORS[5], COLORS[1], COLORS[3], "#bbbbbb"), strict=True))
    figure = new_figure(WIDTH, 3.2 if len(runs) == 1 else 1.3 + 0.4 * len(runs))
    axes = figure.subplots()
    if len(runs) == 1:
        (phases,) = shares
        stretches = np.array_split(np.arange(len(runs[0].steps)), min(40, len(runs[0].steps)))
        places = np.array([np.mean([runs[0].steps[i]["step"] for i in s]) for s in stretches])
        widths, draw = np.array([len(s) for s in stretches]) * 0.9, axes.bar
        heights = {name: np.array([phases[name][s].mean() for s in stretches]) for name in names}
        axes.set_ylabel("seconds per step")
        whole_steps(axes)
    else:
        places, widths, draw = np.arange(len(runs)), 0.7, axes.barh
        heights = {name: np.array([phases[name].mean() for phases in shares]) for name in names}
        axes.set_yticks(places, [label_of(run.label) for run in runs])
        axes.invert_yaxis()
        axes.set_xlabel("seconds per step, mean over the run")
    base = np.zeros(len(places))
    for name in names:
        position = {"bottom": base} if len(runs) == 1 else {"left": base}
        draw(places, heights[name], widths, color=colors[name], label=name, **position)
        base = base + heights[name]
    figure.legend(loc="outside upper left", ncols=len(names), fontsize=8.5, frameon=False, handlelength=1.2)
    return figure


def _phases(run: RunRecord) -> dict[str, np.ndarray]:
    """Seconds of each step by phase, [steps] each; `other` is the rest of step_s: validation, checkpoints, packing."""
    steps = run.steps
    phases = {name: np.array([float(row.get(f"time_{name}_s") or 0) for row in steps]) for name in PHASES}
    whole = np.array([float(row.get("step_s") or 0) for row in steps])
    return phases | {"other": np.maximum(0, whole - sum(phases.values()))}


def _curves(runs: Runs, metric: str, ylabel: str) -> Any | None:
    """One metric over steps, a line per run."""
    figure = new_figure(WIDTH, 3.2)
    axes = figure.subplots()
    if not draw_runs(axes, runs, metric):
        return None
    axes.set_ylabel(ylabel)
    whole_steps(axes)
    legend(axes)
    return figure
