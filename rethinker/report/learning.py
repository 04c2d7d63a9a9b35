"""The learning curve: what one run, or several seeds of one recipe, learned, on one page of a paper.

`python -m rethinker.report.learning RUN... --output learning.svg`. The output's suffix (.svg, .png, .pdf) chooses the
format.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rethinker.config import ConfigError
from rethinker.report.drawing import (
    TEXT,
    legend,
    moving_average,
    new_figure,
    save_figure,
    smoothing_window,
    whole_steps,
)
from rethinker.report.runs import RunRecord, read_run

_REWARD, _ACCURACY, _EFFECTIVE, _REPLAYED = "#2f6db3", "#d9622b", "#3d8f5a", "#8a5ba8"


def learning_curve(run_folders: Sequence[str | Path], output: str | Path) -> Path:
    """Draw what a run learned: sampled reward and greedy held-out accuracy, below them how many queries still teach.

    One run is drawn with its single steps behind a moving average; several (seeds of one recipe) as their mean, in a
    band from the lowest to the highest, over the steps that all of them have.

    Args:
        run_folders: folders that hold a `metrics.jsonl` and, with validation, a `validation.jsonl`.
        output: the file to write; its folder exists.

    Returns:
        `output`.

    Raises:
        ConfigError: a folder is no run's, a run has no step yet, or matplotlib is missing.
    """
    runs = [read_run(folder) for folder in run_folders]
    figure = new_figure(width=7.2, height=5.0)
    above, below = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [2.2, 1]})

    steps, _ = _series(runs, "reward_mean")
    window = smoothing_window(steps.size)
    smoothed = f", mean of {window} steps" if window > 1 else ""
    _draw_series(above, runs, "reward_mean", f"sampled reward{smoothed}", _REWARD, window)
    _draw_accuracy(above, runs)
    above.set_ylabel("reward, accuracy (0 to 1)")
    above.set_title(_heading(run_folders), loc="left", fontsize=10, color=TEXT)

    _draw_series(below, runs, "effective_query_ratio", "queries with an advantage", _EFFECTIVE, window)
    _draw_series(below, runs, "replay_fraction", "pairs from replay", _REPLAYED, window)
    below.set_ylim(-0.03, 1.03)
    below.set_ylabel("share (0 to 1)")
    whole_steps(below)
    for axes in (above, below):
        legend(axes)
    return save_figure(figure, Path(output))


def _draw_series(axes: Any, runs: list[RunRecord], metric: str, label: str, color: str, window: int) -> None:
    """A metric over steps: moving average over single steps, or mean and range over runs."""
    steps, values = _series(runs, metric)  # [steps], [runs, steps]
    if np.isnan(values).all():
        return
    averaged = np.stack([moving_average(row, window) for row in values])
    if len(runs) == 1:
        if window > 1:
            axes.plot(steps, values[0], color=color, alpha=0.28, linewidth=0.9)
    else:
        axes.fill_between(steps, averaged.min(0), averaged.max(0), color=color, alpha=0.18, linewidth=0)
    marker = "o" if steps.size == 1 else None  # one point is no line
    axes.plot(steps, averaged.mean(0), color=color, linewidth=2, marker=marker, label=label)


def _draw_accuracy(axes: Any, runs: list[RunRecord]) -> None:
    """Greedy accuracy where it was measured, its first and last value written beside their points."""
    steps, values = _series(runs, "val_accuracy")
    if not steps.size:
        return
    mean = values.mean(0)
    if len(runs) > 1:
        axes.fill_between(steps, values.min(0), values.max(0), color=_ACCURACY, alpha=0.18, linewidth=0)
    axes.plot(steps, mean, color=_ACCURACY, linewidth=1.6, marker="o", markersize=4.5, label="greedy held-out accuracy")
    style = {"textcoords": "offset points", "color": _ACCURACY, "fontsize": 9, "fontweight": "bold"}
    axes.annotate(f"{mean[-1]:.3f}", (steps[-1], mean[-1]), (7, 0), ha="left", va="center", **style)
    if steps.size > 1:
        axes.annotate(f"{mean[0]:.3f}", (steps[0], mean[0]), (0, 7), ha="center", va="bottom", **style)
    axes.margins(y=0.1)


def _series(runs: list[RunRecord], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps at which every run has the metric, and its values.

    Returns:
        steps [steps], values [runs, steps].
    """
    by_step = [dict(zip(*run.series(metric), strict=True)) for run in runs]
    steps = sorted(set.intersection(*(set(values) for values in by_step)))
    return np.array(steps), np.array([[values[step] for step in steps] for values in by_step], dtype=float)


def _heading(run_folders: Sequence[str | Path]) -> str:
    names = [Path(folder).resolve().name for folder in run_folders]
    return names[0] if len(names) == 1 else f"{len(names)} runs: mean and range"


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m rethinker.report.learning RUN... --output FILE`: exit code 2 where there is nothing to draw."""
    parser = argparse.ArgumentParser(prog="python -m rethinker.report.learning", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run: runs/<run.name>")
    parser.add_argument("--output", type=Path, default=Path("learning.svg"), help=".svg, .png or .pdf")
    options = parser.parse_args(arguments)
    try:
        print(learning_curve(options.runs, options.output))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
