"""How every figure looks: canvas, lines over steps, groups of bars, legend, and the same bytes for the same numbers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

# Okabe and Ito's, less their yellow: distinct with any colour vision, dark enough on white.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#56b4e9", "#8c6d00", "#444444")
LONGEST_LABEL = 24
"""Of a category, in characters."""
WIDTH = 5.2  # inches: on a phone's 390 px the labels are still 8 px high

LOOK = {
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#888888", "axes.axisbelow": True},
    **{"axes.grid": True, "axes.grid.axis": "y", "grid.color": "#e4e4e4", "axes.labelsize": 9, "font.size": 8.5},
    **{"axes.titlesize": 9, "axes.titlelocation": "left", "text.color": "#222222", "axes.labelcolor": "#222222"},
    # Text stays text in SVG: readable by machines and half the size of glyph outlines. No formulas in names.
    **{"svg.fonttype": "none", "svg.hashsalt": "rethinker", "text.parse_math": False},
    "path.simplify_threshold": 1.0,  # no finer than can be seen: a page stays small however long the run
}
in_our_look = matplotlib.rc_context(LOOK)
"""Decorates a function that draws."""


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure, in inches: no window, no global state."""
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def style_of(number: int) -> dict[str, Any]:
    """Colour and dashes of the run at this place."""
    dashes = ("-", "--", "-.", ":")[number // len(COLORS) % 4]
    return {"color": COLORS[number % len(COLORS)], "linestyle": dashes}


def label_of(text: str) -> str:
    """A user's text as a label: matplotlib hides those that begin with an underscore, and XML has no control
    characters."""
    text = "".join(character if character.isprintable() else "?" for character in text)
    return f" {text}" if text.startswith("_") else text


def short_label(text: str) -> str:
    """A category's name, cut so that several fit above a panel."""
    return text if len(text) <= LONGEST_LABEL else f"{text[: LONGEST_LABEL - 1]}\N{HORIZONTAL ELLIPSIS}"


def draw_line(
    axes: Any, values: pd.DataFrame, label: str, *, points: bool = False, single_steps: bool = False, **style: Any
) -> None:
    """The moving average of a metric, `values` [steps, runs]: of several runs as their mean and range. `points` draws
    what was measured now and then, as it is; `single_steps` one run's steps behind their average."""
    window = 1 if points else smoothing_window(len(values))
    averages = smoothed(values, window)
    if values.shape[1] > 1:
        low, high = averages.min(axis=1), averages.max(axis=1)
        axes.fill_between(values.index, low, high, color=style["color"], alpha=0.18, linewidth=0)
    elif single_steps and window > 1:
        axes.plot(values, color=style["color"], alpha=0.28, linewidth=0.9)
    marker = "o" if points or len(values) == 1 else None  # one point is no line
    look = {"linewidth": 1.8, "marker": marker, "markersize": 4} | style
    axes.plot(averages.mean(axis=1), label=label_of(label), **look)
    axes.xaxis.get_major_locator().set_params(integer=True)


def draw_joins(axes: Any, steps: Iterable[int]) -> None:
    """A thin line where a later stage of a run begins."""
    for step in steps:
        axes.axvline(step, color="#222222", linewidth=0.7, zorder=2.5)  # above areas, too


def smoothed(values: pd.DataFrame, window: int) -> pd.DataFrame:
    """The centred moving average over so many rows, over fewer at both ends."""
    return values.rolling(window, center=True, min_periods=1).mean()


def smoothing_window(points: int) -> int:
    """A tenth of the points, odd, so that the average is centred."""
    return max(1, round(points / 10) // 2 * 2 + 1)


def draw_bars(axes: Any, heights: pd.DataFrame, form: str) -> None:
    """A group of bars for every row, a bar for every column, each with its height written over it; none for NaN."""
    width = 0.8 / len(heights.columns)
    for number, (label, values) in enumerate(heights.items()):
        places = np.arange(len(values)) + (number - (len(heights.columns) - 1) / 2) * width
        bars = axes.bar(places, values, width * 0.92, color=COLORS[number % len(COLORS)], label=label_of(label))
        axes.bar_label(bars, fmt=form, fontsize=7.5, padding=1)
    axes.set_xticks(range(len(heights)), heights.index)
    axes.margins(y=0.13)


def legend(figure: Figure, columns: int = 4) -> None:
    """One legend above all panels."""
    handles = [axes.get_legend_handles_labels() for axes in figure.axes]
    by_label = {label: handle for found, labels in handles for handle, label in zip(found, labels, strict=True)}
    options = {"ncols": columns, "frameon": False, "handlelength": 1.4}
    figure.legend(by_label.values(), by_label.keys(), loc="outside upper left", **options)


@in_our_look
def save_figure(figure: Figure, output: Path) -> Path:
    """Write the figure; the same metrics give the same bytes."""
    figure.savefig(output, dpi=160, metadata={"Date": None} if output.suffix == ".svg" else None)
    return output
