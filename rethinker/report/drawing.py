"""How every figure looks: an empty canvas, lines over steps, smoothing, and the same bytes for the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rethinker.config import ConfigError
from rethinker.report.runs import RunRecord

TEXT, GRID = "#222222", "#e4e4e4"
# Okabe and Ito's, less their yellow: distinct with any colour vision, dark enough on white. Marks and dashes differ
# too.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#56b4e9", "#8c6d00", "#444444")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MOST_POINTS = 400
"""Longer lines are drawn through the means of equal stretches of steps: a page stays small however long the run."""


def new_figure(width: float, height: float) -> Any:
    """An empty figure, in inches: no window, no global state."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ConfigError("figures need matplotlib: install the extra `cpu` or `gpu`") from error
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def style_of(number: int) -> dict[str, Any]:
    """Colour and dashes of the run at this place."""
    dashes = ("-", "--", "-.", ":")[number // len(COLORS) % 4]
    return {"color": COLORS[number % len(COLORS)], "linestyle": dashes}


def label_of(text: str) -> str:
    """A user's text as matplotlib shall show it: no formula between dollar signs, and no hidden legend entry."""
    return text.replace("$", r"\$") if not text.startswith("_") else " " + text.replace("$", r"\$")


def draw_runs(axes: Any, runs: Sequence[RunRecord | None], metric: str, suffix: str = "", **style: Any) -> bool:
    """One line per run over its steps: the moving average, and for a single run its single steps behind it.

    Args:
        axes: where to draw.
        runs: a run without the metric is left out, and so is None.
        metric: a key of metrics.jsonl.
        suffix: joins the run's label.
        style: overrides the run's own.

    Returns:
        Whether there was anything to draw.
    """
    drawn = False
    for number, run in enumerate(runs):
        steps, values = thinned(*run.series(metric)) if run else (np.array([]),) * 2
        if not steps.size:
            continue
        window = smoothing_window(steps.size)
        look = {"linewidth": 1.8, "marker": "o" if steps.size == 1 else None} | style_of(number) | style
        if len(runs) == 1 and window > 1:
            axes.plot(steps, values, color=look["color"], alpha=0.28, linewidth=0.9)
        axes.plot(steps, moving_average(values, window), label=label_of(run.label + suffix), **look)
        drawn = True
    return drawn


def thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MOST_POINTS points: the means of equal stretches of steps."""
    if steps.size <= MOST_POINTS:
        return steps, values
    stretches = np.array_split(np.arange(steps.size), MOST_POINTS)
    return np.array([steps[s].mean() for s in stretches]), np.array([values[s].mean() for s in stretches])


def smoothing_window(points: int) -> int:
    """A tenth of the points, odd, so that the average is centred."""
    return max(1, round(points / 10) // 2 * 2 + 1)


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` values, over fewer at the ends."""
    reach = window // 2
    return np.array([values[max(0, i - reach) : i + reach + 1].mean() for i in range(values.size)])


def whole_steps(axes: Any) -> None:
    """The x axis counts optimizer steps: whole numbers."""
    axes.set_xlabel("optimizer step")
    axes.xaxis.get_major_locator().set_params(integer=True)


def legend(axes: Any, **options: Any) -> None:
    """A legend where anything is labelled."""
    if axes.get_legend_handles_labels()[0]:
        look = {"edgecolor": "none", "framealpha": 0.9, "fontsize": 8.5, "labelcolor": TEXT, "loc": "best"}
        axes.legend(**look | options)


def save_figure(figure: Any, output: Path) -> Path:
    """Write the figure in the project's look; the same metrics give the same bytes."""
    import matplotlib

    for axes in figure.axes:
        second = axes.yaxis.get_label_position() == "right"  # an axis at the right of another panel's
        axes.spines["top" if second else ["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#888888")
        axes.tick_params(which="both", colors=TEXT, labelsize=8.5)
        axes.xaxis.label.set(color=TEXT, fontsize=9)
        axes.yaxis.label.set(color=TEXT, fontsize=9)
        axes.set_axisbelow(True)
        if not second:
            axes.grid(axis="y", color=GRID, linewidth=0.8)
    # Text stays text in SVG: readable by machines and half the size of glyph outlines.
    undated = {"Date": None} if output.suffix == ".svg" else None
    with matplotlib.rc_context({"svg.hashsalt": "rethinker", "svg.fonttype": "none"}):
        figure.savefig(output, dpi=160, metadata=undated)
    return output
