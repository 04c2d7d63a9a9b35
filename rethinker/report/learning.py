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

    window = smoothing_window(min(run.series("reward_mean")[0].size for run in runs))
    smoothed = f", mean of {window} steps" if window > 1 else ""
    _draw(above, runs, "reward_mean", f"sampled reward{smoothed}", _REWARD, window)
    accuracy = _draw(above, runs, "val_accuracy", "greedy held-out accuracy", _ACCURACY)
    if accuracy.size:
        _write_ends(above, *accuracy)
    above.set_ylabel("reward, accuracy (0 to 1)")
    names = [Path(folder).resolve().name for folder in run_folders]
    heading = names[0] if len(names) == 1 else f"{len(names)} runs: mean and range"
    above.set_title(heading, loc="left", fontsize=10, color=TEXT)
    _draw(below, runs, "effective_query_ratio", "queries with an advantage", _EFFECTIVE, window)
    _draw(below, runs, "replay_fraction", "pairs from replay", _REPLAYED, window)
    below.set_ylim(-0.03, 1.03)
    below.set_ylabel("share (0 to 1)")
    whole_steps(below)
    for axes in (above, below):
        legend(axes)
    return save_figure(figure, Path(output))


def _draw(axes: Any, runs: list[RunRecord], metric: str, label: str, color: str, window: int = 1) -> np.ndarray:
    """A metric over the steps that every run has: moving average over single steps, or mean and range over runs.

    Returns:
        The drawn points [2, steps]; none where there is nothing to draw.
    """
    by_step = [dict(zip(*run.series(metric), strict=True)) for run in runs]
    steps = sorted(set.intersection(*map(set, by_step)))
    if not steps:
        return np.empty((2, 0))
    values = np.array([[found[step] for step in steps] for found in by_step])  # [runs, steps]
    averaged = np.stack([moving_average(row, window) for row in values])
    if len(runs) > 1:
        axes.fill_between(steps, averaged.min(0), averaged.max(0), color=color, alpha=0.18, linewidth=0)
    elif window > 1:
        axes.plot(steps, values[0], color=color, alpha=0.28, linewidth=0.9)
    points = window == 1 and (metric == "val_accuracy" or len(steps) == 1)  # one point is no line
    mean = averaged.mean(0)
    axes.plot(steps, mean, color=color, linewidth=1.8, marker="o" if points else None, markersize=4.5, label=label)
    return np.array([steps, mean])


def _write_ends(axes: Any, steps: np.ndarray, values: np.ndarray) -> None:
    """The first and the last accuracy beside their points."""
    style = {"textcoords": "offset points", "color": _ACCURACY, "fontsize": 9, "fontweight": "bold"}
    axes.annotate(f"{values[-1]:.3f}", (steps[-1], values[-1]), (7, 0), ha="left", va="center", **style)
    if steps.size > 1:
        axes.annotate(f"{values[0]:.3f}", (steps[0], values[0]), (0, 7), ha="center", va="bottom", **style)
    axes.margins(y=0.1)


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
