"""The learning curve: what one run, or several seeds of one recipe, learned, on one page of a paper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from rethinker.report.drawing import draw_joins, draw_line, in_our_look, new_figure, save_figure, smoothing_window
from rethinker.report.runs import read_runs

PANELS = {
    "reward, accuracy (0 to 1)": {
        "reward_mean": ("sampled reward", "#2f6db3"),
        "val_accuracy": ("greedy held-out accuracy", "#d9622b"),
    },
    "share (0 to 1)": {
        "effective_query_ratio": ("queries with an advantage", "#3d8f5a"),
        "replay_fraction": ("pairs from replay", "#8a5ba8"),
    },
}


@in_our_look
def learning_curve(run_folders: Sequence[str | Path], output: str | Path) -> Path:
    """Draw what a run learned: sampled reward and greedy held-out accuracy, below them how many queries still teach.

    One run is drawn with its single steps behind a moving average; several (seeds of one recipe) as their mean, in a
    band from the lowest to the highest, over the steps that all of them have. `output` ends in .svg, .png or .pdf.

    Raises:
        ConfigError: a folder is no run's, or a run has no step yet.
    """
    runs = read_runs(run_folders)
    figure = new_figure(5.0, width=7.2)
    panes = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 1])
    for axes, (title, metrics) in zip(panes, PANELS.items(), strict=True):
        for metric, (label, color) in metrics.items():
            values = pd.concat([run.series(metric) for run in runs], axis=1, join="inner")  # [steps, runs]
            points = metric == "val_accuracy"
            if points and len(values):
                label += ", {:.3f} to {:.3f}".format(*values.mean(axis=1).iloc[[0, -1]])
            elif (window := smoothing_window(len(values))) > 1 and metric == "reward_mean":
                label += f", mean of {window} steps"
            if len(values):
                draw_line(axes, values, label, points=points, single_steps=True, color=color)
        draw_joins(axes, {step for run in runs for step in run.joins})
        axes.set_ylabel(title)
        axes.legend(frameon=False)
    panes[0].set_title(runs[0].name if len(runs) == 1 else f"{len(runs)} runs: mean and range", fontsize=10)
    panes[1].set_ylim(-0.03, 1.03)
    panes[1].set_xlabel("optimizer step")
    return save_figure(figure, Path(output))
