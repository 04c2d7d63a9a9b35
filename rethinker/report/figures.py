"""The figures of the page in their order, from the metrics of one run or of several side by side.

Of one run, story.py draws some of this closer to what it learned; a figure `of` several runs is left to it then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from rethinker.report.drawing import (
    COLORS,
    draw_bars,
    draw_joins,
    draw_line,
    in_our_look,
    legend,
    new_figure,
    short_label,
    style_of,
)
from rethinker.report.runs import RunRecord
from rethinker.runtime.profiling import PHASES

Runs = Sequence[RunRecord]
ADVANTAGES = ("0", "0 to 0.5", "0.5 to 1", "1 to 1.5", "1.5 to 2", "above 2")
"""The bins of `advantage_histogram` in words (algorithm/selection.py: ADVANTAGE_BINS)."""
MOST_CATEGORIES = 8
"""Lines of one panel: the first ones by name."""
# Drawn from 0 to 1.
SHARES = ("effective_query_ratio", "sampled_effective_ratio", "replay_fraction", "tool_use_ratio")


@dataclass(frozen=True)
class ReportFigure:
    """One figure of the page: lines of metrics over steps, or what `draw` makes of the runs."""

    name: str  # of its file, <name>.svg
    title: str
    meaning: str  # what the reader sees in it
    panels: dict[str, str]  # {metric: title of its panel}
    draw: Callable[[Runs], Figure | None] | None = None
    of: Literal["any", "one", "several"] = "any"  # how many runs the page is about
    needs: str | None = None  # a metric that is null in runs which the figure says nothing about

    def suits(self, runs: Runs) -> bool:
        """Whether it is a figure of a page about these runs."""
        known = self.needs is None or any(not run.series(self.needs).empty for run in runs)
        return known and self.of in ("any", "one" if len(runs) == 1 else "several")

    @in_our_look
    def drawn(self, runs: Runs) -> Figure | None:
        """The figure; None where no run has what it shows."""
        return self.draw(runs) if self.draw else curves(runs, self.panels)


def curves(runs: Runs, panels: dict[str, str]) -> Figure | None:
    """Metrics over steps: a panel per metric, a line per run. What is 0 at every step has no line."""
    lines = {metric: [run.series(metric) for run in runs] for metric in panels}
    shown = [metric for metric in panels if any(values.any() for values in lines[metric])]
    if not shown:
        return None
    columns = 1 if len(shown) < 4 else 2
    rows = -(-len(shown) // columns)
    figure = new_figure(1.2 + 1.7 * rows)
    panes = figure.subplots(rows, columns, sharex=True, squeeze=False).ravel()
    for axes, metric in zip(panes, shown, strict=False):
        for number, (run, values) in enumerate(zip(runs, lines[metric], strict=True)):
            if values.any():
                look = {"points": metric == "val_accuracy", "single_steps": len(runs) == 1, **style_of(number)}
                draw_line(axes, values.to_frame(), run.label, **look)
        draw_joins(axes, {step for run in runs for step in run.joins})
        axes.set_title(panels[metric])
        if metric in SHARES:
            axes.set_ylim(-0.03, 1.03)
    for axes in panes[len(shown) :]:
        axes.remove()
    for axes in panes[len(shown) - columns : len(shown)]:
        axes.tick_params(labelbottom=True)
    figure.supxlabel("optimizer step", fontsize=9)
    if len(runs) > 1:
        legend(figure)
    return figure


def advantages(runs: Runs) -> Figure | None:
    """Per cent of the trained samples by the size of their advantage, over the whole run."""
    shares = {}
    for run in runs:
        rows = [row.get("advantage_histogram") or () for row in run.steps]
        rows = [row for row in rows if len(row) == len(ADVANTAGES)]
        counts = np.sum(rows, axis=0) if rows else np.zeros(len(ADVANTAGES))  # [bins]
        shares[run.label] = 100 * counts / counts.sum() if counts.any() else np.nan
    heights = pd.DataFrame(shares, index=ADVANTAGES)
    if heights.isna().all(axis=None):
        return None
    figure = new_figure(3.2)
    axes = figure.subplots()
    draw_bars(axes, heights, "%.0f")
    axes.set_xlabel("size of the advantage, |A|")
    axes.set_ylabel("trained pairs, %")
    legend(figure)
    return figure


def refill(runs: Runs) -> Figure | None:
    """What episodes sampled to be full; None where no run refilled."""
    if not any(run.series("refill_rounds").any() for run in runs):
        return None
    panels = {"sampled_effective_ratio": "effective among all sampled (0 to 1)", "sampled_queries": "queries sampled"}
    return curves(runs, panels)


def phase_times(runs: Runs) -> Figure | None:
    """Mean seconds per optimizer step, stacked by phase, a bar per run; `other` is the rest of step_s."""
    names = {f"time_{phase}_s": phase for phase in PHASES} | {"step_s": "step"}
    means = {run.label: run.metrics.reindex(columns=list(names)).mean() for run in runs}
    seconds = pd.DataFrame(means).fillna(0).T.rename(columns=names)  # [runs, phases]
    seconds["other"] = (seconds.pop("step") - seconds.sum(axis=1)).clip(lower=0)
    if not seconds.any(axis=None):
        return None
    figure = new_figure(1.4 + 0.4 * len(runs))
    axes = figure.subplots()
    colors = dict(zip(PHASES, COLORS, strict=False)) | {"other": "#bbbbbb"}
    start = np.zeros(len(runs))
    for phase, values in seconds.loc[:, seconds.any()].items():
        axes.barh(range(len(runs)), values, 0.7, left=start, color=colors[phase], label=phase)
        start += values
    axes.set_yticks(range(len(runs)), seconds.index)
    axes.invert_yaxis()
    axes.set_xlabel("seconds per step, mean over the run")
    legend(figure)
    return figure


def replay(runs: Runs) -> Figure | None:
    """What replay holds, and of several runs its share of the batch."""
    panels = {"replay_fraction": "share of the batch"} if len(runs) > 1 else {}
    panels |= {"replay_size": "samples in the buffer", "replay_age_mean": "age of draws (steps)"}
    return curves(runs, panels)


def replay_categories(runs: Runs) -> Figure | None:
    """Shares of the fresh queries and of replay's draws by category, one above the other."""
    (run,) = runs
    fresh, draws = run.mapping("queries_by_category"), run.mapping("replay_by_category")
    if draws.empty:
        return None
    figure = new_figure(4.6)
    panes = figure.subplots(2, 1, sharex=True, sharey=True)
    names = sorted({*fresh, *draws})[:MOST_CATEGORIES]
    for axes, shares, title in zip(panes, (fresh, draws), ("fresh queries, %", "replay's draws, %"), strict=True):
        percent = 100 * shares.fillna(0)
        for number, name in enumerate(names):
            if name in percent:
                draw_line(axes, percent[[name]], short_label(name), **style_of(number))
        draw_joins(axes, run.joins)
        axes.set_title(title)
    figure.supxlabel("optimizer step", fontsize=9)
    legend(figure)
    return figure


def environment_failures(runs: Runs) -> Figure | None:
    """What failed per response: of one run a line per reason, of several a line per run."""
    lines: dict[str, pd.DataFrame] = {}
    for run in runs:
        steps = run.series("turns_mean").index  # a step in which nothing failed has no reasons
        failed = run.mapping("environment_failures").reindex(steps).fillna(0)  # [steps, reasons]
        if len(runs) == 1:
            lines = {short_label(name): failed[[name]] for name in failed.columns[:MOST_CATEGORIES]}
        elif len(steps):
            lines[run.label] = failed.sum(axis=1).to_frame()
    if not any(line.any(axis=None) for line in lines.values()):
        return None
    figure = new_figure(2.9)
    axes = figure.subplots()
    for number, (label, line) in enumerate(lines.items()):
        draw_line(axes, line, label, single_steps=len(runs) == 1, **style_of(number))
    draw_joins(axes, {step for run in runs for step in run.joins})
    axes.set_title("failures per response")
    axes.set_xlabel("optimizer step")
    legend(figure)
    return figure


FIGURES = (
    ReportFigure(
        "validation",
        "Held-out accuracy",
        "Greedy answers to held-out questions, judged by the training reward. Step 0 is before training.",
        {"val_accuracy": "greedy accuracy (0 to 1)"},
        of="several",
    ),
    ReportFigure(
        "reward",
        "Sampled reward",
        "Mean reward of each step's fresh responses, as a moving average.",
        {"reward_mean": "sampled reward"},
    ),
    ReportFigure(
        "effective_queries",
        "Effective queries",
        "Share of queries whose responses are neither all right nor all wrong. Only these carry an advantage; as the "
        "share falls, plain GRPO trains on less and less.",
        {"effective_query_ratio": "effective queries (0 to 1)"},
        of="several",
    ),
    ReportFigure(
        "refill",
        "Refill",
        "Share of the queries sampled for an episode whose rewards differ, and how many were sampled until it was "
        "full. Runs with algorithm.refill_rounds drop the others.",
        {},
        refill,
    ),
    ReportFigure(
        "advantages",
        "Training advantages",
        "Trained pairs by the size of their advantage, over the whole run. Pairs at 0 teach nothing. "
        "Filtering drops them, and replay draws large advantages more often.",
        {},
        advantages,
    ),
    ReportFigure(
        "replay",
        "Selective Sample Replay",
        "Samples in the buffer, the mean age of the drawn ones in optimizer steps, and, of several runs, the share of "
        "the batch that comes from replay. Runs with algorithm.name: ssr replay.",
        {},
        replay,
    ),
    ReportFigure(
        "replay_categories",
        "Replay's draws by category",
        "Where the fresh queries come from, and below it where replay's draws come from: it draws large advantages, "
        "so categories with rare successes or rare failures more often.",
        {},
        replay_categories,
        of="one",
    ),
    ReportFigure(
        "response_length",
        "Response length",
        "Mean tokens per sampled response, and the share of responses that rethink unforced.",
        {"response_length_mean": "tokens per response", "rethink_ratio": "share that rethinks"},
        of="several",
    ),
    ReportFigure(
        "tools",
        "Tool use",
        "Sampled responses that call a tool, tool calls per response, and turns of the policy per response.",
        {
            "tool_use_ratio": "responses that call a tool (0 to 1)",
            "tool_calls_mean": "tool calls per response",
            "turns_mean": "turns per response",
        },
        needs="turns_mean",
    ),
    ReportFigure(
        "environment_failures",
        "Failures of the environment",
        "Tool calls that failed, and responses that the environment or a limit ended, per response: of one run by "
        "their reasons.",
        {},
        environment_failures,
        needs="turns_mean",
    ),
    ReportFigure(
        "policy",
        "Entropy, clipping and KL",
        "Clipped tokens are those whose ratio left the clip range, above or below. The KL from trainer to rollout "
        "engine is taken right after a weight sync: it should stay at rounding error.",
        {
            "entropy": "entropy (nats)",
            "clip_fraction_high": "clipped tokens, above",
            "clip_fraction_low": "clipped tokens, below",
            "old_kl": "KL to behaviour policy",
            "mismatch_kl": "KL trainer to rollout",
            "correction_masked": "tokens masked for it",
            "grad_norm": "gradient norm",
            "loss": "loss",
            "kl": "KL to reference",
        },
    ),
    ReportFigure(
        "time",
        "Time per step",
        "Rethink is the second pass of forced rethinking; other is validation and choosing the batch.",
        {},
        phase_times,
    ),
)
