"""Figures from the metrics of runs, one function each.

`python -m rethinker.report.figures RUN... --output learning.svg` draws the learning curve of one run, or of several
seeds of one recipe. The output's suffix (.svg, .png, .pdf) chooses the format.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rethinker.config import ConfigError

_REWARD, _ACCURACY, _EFFECTIVE, _REPLAYED = "#2f6db3", "#d9622b", "#3d8f5a", "#8a5ba8"
_TEXT, _GRID = "#333333", "#e4e4e4"


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
    runs = [_read_metrics(Path(folder)) for folder in run_folders]
    figure = _new_figure(width=7.2, height=5.0)
    above, below = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [2.2, 1]})

    steps, _ = _series(runs, "reward_mean")
    window = max(1, round(steps.size / 10) // 2 * 2 + 1)  # odd, so that the average is centred
    smoothed = f", mean of {window} steps" if window > 1 else ""
    _draw_series(above, runs, "reward_mean", f"sampled reward{smoothed}", _REWARD, window)
    _draw_accuracy(above, runs)
    above.set_ylabel("reward, accuracy (0 to 1)")
    above.set_title(_heading(run_folders), loc="left", fontsize=10, color=_TEXT)

    _draw_series(below, runs, "effective_query_ratio", "queries with an advantage", _EFFECTIVE, window)
    _draw_series(below, runs, "replay_fraction", "pairs from replay", _REPLAYED, window)
    below.set_ylim(-0.03, 1.03)
    below.set_ylabel("share (0 to 1)")
    below.set_xlabel("optimizer step")
    below.xaxis.get_major_locator().set_params(integer=True)
    for axes in (above, below):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(edgecolor="none", framealpha=0.9, fontsize=8.5, labelcolor=_TEXT, loc="best")
    return _save(figure, Path(output))


def _draw_series(axes: Any, runs: list[list[dict]], metric: str, label: str, color: str, window: int) -> None:
    """A metric over steps: moving average over single steps, or mean and range over runs."""
    steps, values = _series(runs, metric)  # [steps], [runs, steps]
    if np.isnan(values).all():
        return
    averaged = np.stack([_moving_average(row, window) for row in values])
    if len(runs) == 1:
        if window > 1:
            axes.plot(steps, values[0], color=color, alpha=0.28, linewidth=0.9)
    else:
        axes.fill_between(steps, averaged.min(0), averaged.max(0), color=color, alpha=0.18, linewidth=0)
    marker = "o" if steps.size == 1 else None  # one point is no line
    axes.plot(steps, averaged.mean(0), color=color, linewidth=2, marker=marker, label=label)


def _draw_accuracy(axes: Any, runs: list[list[dict]]) -> None:
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


def _series(runs: list[list[dict]], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps at which every run has the metric, and its values.

    Returns:
        steps [steps], values [runs, steps].
    """
    by_step = [{row["step"]: row[metric] for row in rows if row.get(metric) is not None} for rows in runs]
    steps = sorted(set.intersection(*(set(values) for values in by_step)))
    return np.array(steps), np.array([[values[step] for step in steps] for values in by_step], dtype=float)


def _moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` values, over fewer at the ends."""
    ones = np.ones(window)
    return np.convolve(values, ones, "same") / np.convolve(np.ones_like(values), ones, "same")


def _read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, and of its validation.jsonl, which begins before training (step 0)."""
    file = folder / "metrics.jsonl"
    if not file.is_file():
        raise ConfigError(f"{folder} has no metrics.jsonl; name the folder of a run, as runs/<run.name>")
    rows = _read_lines(file)
    if not any(row.get("reward_mean") is not None for row in rows):
        raise ConfigError(f"{file} has no step with a reward_mean yet, so there is nothing to draw")
    validations = folder / "validation.jsonl"
    return rows + (_read_lines(validations) if validations.is_file() else [])


def _read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file, without a last line that a killed run left half-written."""
    return [json.loads(line) for line in file.read_text("utf-8").splitlines(keepends=True) if line.endswith("\n")]


def _heading(run_folders: Sequence[str | Path]) -> str:
    names = [Path(folder).resolve().name for folder in run_folders]
    return names[0] if len(names) == 1 else f"{len(names)} runs: mean and range"


def _new_figure(width: float, height: float) -> Any:
    """An empty figure, in inches: no window, no global state."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ConfigError("figures need matplotlib: install the extra `cpu` or `gpu`") from error
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _save(figure: Any, output: Path) -> Path:
    """Write the figure in the project's look; the same metrics give the same bytes."""
    import matplotlib

    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#888888")
        axes.tick_params(colors=_TEXT, labelsize=8.5)
        axes.xaxis.label.set(color=_TEXT, fontsize=9)
        axes.yaxis.label.set(color=_TEXT, fontsize=9)
        axes.grid(axis="y", color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
    undated = {"Date": None} if output.suffix == ".svg" else None
    with matplotlib.rc_context({"svg.hashsalt": "rethinker"}):
        figure.savefig(output, dpi=160, metadata=undated)
    return output


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m rethinker.report.figures RUN... --output FILE`: exit code 2 where there is nothing to draw."""
    parser = argparse.ArgumentParser(prog="python -m rethinker.report.figures", description=__doc__.split("\n")[0])
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
