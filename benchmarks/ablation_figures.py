"""The paper's figures of the ablation: effective queries (2), curves (5), advantages (6), rethinking (7)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from benchmarks.ablation_summary import pooled_interval
from rethinker.report.drawing import COLORS, draw_line, in_our_look, legend, new_figure, save_figure, style_of
from rethinker.report.figures import advantages
from rethinker.report.rethinking import compare, rethinking_analysis
from rethinker.report.runs import RunRecord

Results = Mapping[str, Sequence[Mapping[str, Any]]]
"""By method what it learned, one per seed (ablation_summary.joined)."""


def draw_figures(
    task: str,
    results: Results,
    rethinking: Sequence[Mapping[str, Any]],
    compared: Mapping[str, Sequence[Mapping[str, Any]]],
    folder: Path,
) -> list[Path]:
    """Write ablation_<task>_<figure>.svg of what is there.

    Args:
        task: in the files' names.
        results: of the methods, in the order of the legend.
        rethinking: accuracies of `rethinking_accuracies`.
        compared: by name, rows of tables that begin with GRPO.
        folder: where the figures go.
    """
    figures = {}
    if results:
        figures = {"effective_queries": effective_queries(results), "curves": curves(results)}
        figures["advantages"] = in_our_look(advantages)([_as_run(name, own) for name, own in results.items()])
    if rethinking:
        figures["rethinking"] = rethinking_analysis(pd.DataFrame(rethinking).set_index("category"))
    figures |= {name: differences(rows) for name, rows in compared.items()}
    return [save_figure(drawn, folder / f"ablation_{task}_{name}.svg") for name, drawn in figures.items() if drawn]


@in_our_look
def effective_queries(results: Results) -> Figure:
    """Share of the queries that carry an advantage, over steps: the paper's figure 2, for every method."""
    figure = new_figure(3.2)
    axes = figure.subplots()
    for number, (name, own) in enumerate(results.items()):
        columns = [pd.Series(result["per_step"]["effective_query_ratio"]) for result in own]
        table = pd.concat(columns, axis=1, join="inner")  # [steps, seeds]
        draw_line(axes, table.set_index(table.index + 1), name, **style_of(number))
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel("effective queries (0 to 1)")
    axes.set_xlabel("optimizer step")
    legend(figure)
    return figure


@in_our_look
def curves(results: Results) -> Figure:
    """Greedy accuracy on the test questions, and the sampled reward, over sampled tokens: the paper's figure 5."""
    figure = new_figure(5.2)
    panes = figure.subplots(2, 1, sharex=True)
    for number, (name, own) in enumerate(results.items()):
        accuracy = over_tokens([np.transpose(result["curve"]) for result in own])
        draw_line(panes[0], accuracy, name, points=True, **style_of(number))
        steps = [(result["per_step"]["generated_tokens"], result["per_step"]["reward_mean"]) for result in own]
        draw_line(panes[1], over_tokens(steps, points=100), name, **style_of(number))
    panes[0].set_title("greedy accuracy on the test questions; bands are the range of the seeds")
    panes[1].set_title("sampled reward, of the rethought response where one was kept")
    panes[1].set_xlabel("sampled tokens, thousands")
    legend(figure)
    return figure


@in_our_look
def differences(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """The rows' accuracies after the same tokens minus those of the first one, GRPO: mean, 95% interval paired by seed,
    and each seed. Grey is what lies within `pooled_interval` of 0."""
    grpo, *others = rows
    seeds = dict(zip(grpo["seeds"], grpo["accuracies_at_budget"], strict=True))
    others = [row for row in others if row["minus_grpo_at_budget"]]
    figure = new_figure(0.6 + 0.27 * len(others))
    axes = figure.subplots()
    axes.axvline(0, color="#222222", linewidth=0.8)
    if pooled := pooled_interval(rows):
        axes.axvspan(-100 * pooled[0], 100 * pooled[0], color="#222222", alpha=0.1, linewidth=0)
    for place, row in enumerate(others):
        gap, color = row["minus_grpo_at_budget"], COLORS[0]
        values = zip(row["seeds"], row["accuracies_at_budget"], strict=True)
        own = [value - seeds[seed] for seed, value in values if seed in seeds]
        axes.plot(100 * np.array(own), [place] * len(own), "|", color=color, markersize=6, alpha=0.6)
        axes.errorbar(100 * gap["mean"], place, xerr=100 * (gap["half_95"] or 0.0), fmt="o", color=color, markersize=4)
    axes.set_yticks(range(len(others)), [row["method"] for row in others])
    axes.invert_yaxis()
    axes.grid(axis="x")
    axes.set_xlabel("points above GRPO")
    return figure


def over_tokens(curves: Sequence[Any], points: int | None = None) -> pd.DataFrame:
    """Curves of (tokens, values) at the same thousands of tokens, as far as all of them go: [points, curves].

    Without `points` about where they have values themselves: at the mean of their first tokens, of their second, ...
    """
    first, last = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    if points is None:
        shortest = min(len(x) for x, _ in curves)
        tokens = np.mean([[*x[: shortest - 1], x[-1]] for x, _ in curves], axis=0).clip(first, last)
    else:
        tokens = np.linspace(first, last, points)
    return pd.DataFrame({i: np.interp(tokens, x, y) for i, (x, y) in enumerate(curves)}, index=tokens / 1000)


def _as_run(name: str, results: Sequence[Mapping[str, Any]]) -> RunRecord:
    """A method as report/figures.py draws it: the histograms of all its seeds."""
    steps = [{"step": 1, "advantage_histogram": result["advantages"]} for result in results]
    return RunRecord(Path(), {}, steps, [], name)


def rethinking_accuracies(
    evaluations: Sequence[tuple[str, str, Path]], categories: Collection[str]
) -> list[dict[str, Any]]:
    """Figure 7's accuracies, means over the seeds: a row for each of these categories in which the baseline is ever
    right, and for all of them together, with each way to think again (see `report.rethinking.compare`).

    `evaluations` are method, mode and folder of each result of `rethinker eval`.
    """
    tables = []
    for name, mode, folder in evaluations:
        answers = pd.read_parquet(folder / "responses.parquet", columns=["category", "reward", "rethinks"])
        answers = answers[answers.category.isin(list(categories))]
        answers = answers.assign(accuracy=answers.reward >= 1.0).drop(columns="reward")
        own = pd.concat([answers, answers.assign(category="all")]).groupby("category").mean().reset_index()
        tables.append(own.assign(model=name, mode=mode))
    found = pd.concat(tables).rename(columns={"category": "benchmark", "rethinks": "rethink_ratio"})
    found = found.groupby(["model", "benchmark", "mode"], sort=False).mean().reset_index()
    if not found.accuracy[found.model == "SSR"].any():  # nothing to compare with
        return []
    return compare(found)[1].rename_axis(index="category", columns=None).reset_index().to_dict("records")
