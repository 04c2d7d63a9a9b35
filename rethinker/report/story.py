"""What one run learned, for the page's first screen: four figures, one question before and after training, and a
response that rethinks.

A run that goes on from others is one with them.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
import pyarrow.parquet as pq
from matplotlib.figure import Figure

from rethinker.algorithm.rethinking import rethinks
from rethinker.report.completions import SCORES, columns_of, describe_group, describe_response, first_value
from rethinker.report.drawing import (
    COLORS,
    draw_joins,
    draw_line,
    legend,
    new_figure,
    short_label,
    smoothed,
    smoothing_window,
    style_of,
)
from rethinker.report.figures import MOST_CATEGORIES, ReportFigure, Runs
from rethinker.report.runs import RunRecord
from rethinker.rewards.answers import boxed_span

HEIGHT = 2.1
"""Of a figure, in inches: two rows of them and the example's heading fit a window of 1200 x 900 pixels."""
IMAGE = 640
"""Longest side of the example's image, in pixels."""
KINDS = {"fast": "#b4bac2", "slow": COLORS[0], "rethinking": COLORS[1]}


def kinds(runs: Runs) -> Figure | None:
    """Fast, slow and rethinking responses as stacked shares."""
    (run,) = runs
    shares = pd.DataFrame({"fast": run.series("fast_ratio"), "rethinking": run.series("rethink_ratio")}).dropna()
    if shares.empty:
        return None
    shares["slow"] = (1 - shares.fast - shares.rethinking).clip(lower=0)
    percent = 100 * smoothed(shares, smoothing_window(len(shares)))[list(KINDS)]
    figure, axes = _panel(run, "responses, %")
    axes.stackplot(percent.index, percent.T, labels=KINDS, colors=KINDS.values(), linewidth=0)
    axes.set_ylim(0, 100)
    legend(figure)
    return figure


def accuracy(runs: Runs) -> Figure | None:
    """Greedy accuracy by category, and overall in bold."""
    (run,) = runs
    overall, by_category = run.series("val_accuracy"), run.mapping("by_category")
    if overall.empty:
        return None
    figure, axes = _panel(run, "greedy accuracy (0 to 1)")
    for number, name in enumerate(by_category.columns[:MOST_CATEGORIES] if by_category.shape[1] > 1 else ()):
        draw_line(axes, by_category[[name]].dropna(), short_label(name), points=True, **style_of(number))
    draw_line(axes, overall.to_frame(), "overall", points=True, color="#111111", linewidth=3.2)
    legend(figure)
    return figure


def lengths(runs: Runs) -> Figure | None:
    """Tokens per response."""
    return _metrics(runs, "tokens per response", {"response_length_mean": "tokens per response"})


def effective(runs: Runs) -> Figure | None:
    """Queries that still teach, and what replay adds."""
    shown = {"effective_query_ratio": "effective queries", "replay_fraction": "replay's share of the batch"}
    figure = _metrics(runs, "share (0 to 1)", shown)
    if figure:
        figure.axes[0].set_ylim(-0.03, 1.03)
    return figure


def _metrics(runs: Runs, title: str, shown: dict[str, str]) -> Figure | None:
    """Metrics in one panel, with their single steps; what is 0 at every step has no line."""
    (run,) = runs
    lines = {label: run.series(metric) for metric, label in shown.items() if run.series(metric).any()}
    if not lines:
        return None
    figure, axes = _panel(run, title)
    for number, (label, values) in enumerate(lines.items()):
        draw_line(axes, values.to_frame(), label, single_steps=True, **style_of(number))
    if len(lines) > 1:
        legend(figure)
    return figure


def _panel(run: RunRecord, title: str) -> tuple[Figure, Any]:
    figure = new_figure(HEIGHT)
    axes = figure.subplots()
    draw_joins(axes, run.joins)
    axes.set_title(title)
    axes.set_xlabel("optimizer step")
    return figure, axes


STORY = (
    ReportFigure(
        "kinds",
        "How it answers",
        "Sampled responses, a moving average: fast ones are nothing but the answer, slow ones work it out, rethinking "
        "ones doubt of their own accord and go on.",
        {},
        kinds,
        of="one",
    ),
    ReportFigure(
        "validation",
        "Held-out accuracy",
        "Greedy answers to held-out questions, judged by the training reward. Step 0 is before training.",
        {},
        accuracy,
        of="one",
    ),
    ReportFigure("response_length", "Response length", "Mean tokens per sampled response.", {}, lengths, of="one"),
    ReportFigure(
        "effective_queries",
        "Effective queries and replay",
        "Queries whose responses are neither all right nor all wrong carry an advantage; replay fills the batch where "
        "they get fewer.",
        {},
        effective,
        of="one",
    ),
)


def before_and_after(run: RunRecord, unreadable: list[str]) -> dict[str, Any] | None:
    """A held-out question (see `describe_group`) whose greedy answer went from wrong to right, the same one each time,
    with a `title`; its responses have a `when`, and those of a run in stages show what each stage started from.

    An answer that was fast is preferred, of the last stage then one that rethinks, then the longest. None where nothing
    was recorded or no answer changed so; files that cannot be read are added to `unreadable`.
    """
    stages = [*run.earlier, run]
    moments = [("before training", _answers(stages[0], unreadable, first=True))]
    for number, stage in enumerate(stages[1:], start=1):
        moments.append((f"after stage {number}", _answers(stage, unreadable, first=True)))
    moments.append(("after training", _answers(run, unreadable, first=False)))
    before, after = moments[0][1], moments[-1][1]

    def preference(key: tuple[str, ...]) -> tuple[bool, bool, int]:
        response = after[key][1]
        return before[key][1]["fast"], len(stages) > 1 and response["rethinks"], response["tokens"]

    changed = [
        key
        for key, (_, response) in before.items()
        if response["verdict"] == "wrong" and key in after and after[key][1]["verdict"] == "right"
    ]
    if not changed:
        return None
    chosen = max(changed, key=preference)  # the first one of equals
    shown = [(when, answers[chosen][1]) for when, answers in moments if chosen in answers]
    example = describe_group(run, after[chosen][0], IMAGE)
    example["title"] = "One held-out question, answered greedily before and after training"
    return example | {"responses": [response | {"when": when} for when, response in shown]}


def own_rethinking(run: RunRecord, unreadable: list[str]) -> dict[str, Any] | None:
    """A response of the run's last recorded episode that doubts of its own accord and is right after it, with its
    question (see `describe_group`) and a `title`.

    One that had boxed another answer before is preferred, then the shortest. None without any; a file that cannot be
    read is added to `unreadable`.
    """
    files = sorted((run.folder / "completions").glob("episode_*.parquet"))
    if not files:
        return None
    try:
        few = [name for name in columns_of(files[-1]) if name in ("group", "response", "reward", SCORES, "rethought")]
        rows = pq.read_table(files[-1], columns=few).to_pylist()
        right = [row for row in rows if row["rethought"] is None and (first_value(row) or 0) >= 1]
        found = [row for row in right if _thinks_again(row["response"])]
        if not found:
            return None
        chosen = min(found, key=lambda row: (not _changes_its_answer(row["response"]), len(row["response"])))
        own = pq.read_table(
            files[-1], columns=columns_of(files[-1]), filters=[("group", "=", chosen["group"])]
        ).to_pylist()
        response = next(row for row in own if row["response"] == chosen["response"])
        return describe_group(run, own[0], IMAGE) | {  # a group's first row alone has its images
            "title": "One sampled response that rethinks of its own accord, in the last episode",
            "responses": [describe_response(response, run.settings) | {"when": "sampled"}],
        }
    except Exception:  # of another hand: pyarrow and what reads the rows raise anything
        unreadable.append(f"{run.name}/{files[-1].name}")
        return None


def _thinks_again(text: str) -> bool:
    """Whether a doubt stands before the last boxed answer."""
    last = boxed_span(text)
    return last is not None and rethinks(text[: last[0]])


def _changes_its_answer(text: str) -> bool:
    """Whether what is boxed last is not all that is boxed."""
    answers, span = [], boxed_span(text)
    while span:
        answers.append("".join(text[slice(*span)].split()))
        span = boxed_span(text[: span[0]])
    return len(set(answers)) > 1


def _answers(
    stage: RunRecord, unreadable: list[str], first: bool
) -> dict[tuple[str, ...], tuple[dict[str, Any], dict[str, Any]]]:
    """The row and the response of each question at a stage's validation before its first step, or at its last one."""
    start = stage.folder / "validation" / "step_000000.parquet"
    files = [file for file in sorted(start.parent.glob("step_*.parquet")) if (file == start) == first]
    try:
        rows = pq.read_table(files[-1], columns=columns_of(files[-1])).to_pylist() if files else []
        keys = [(row["query_id"], row["question"], row["answer"]) for row in rows]
        return {key: (row, describe_response(row, stage.settings)) for key, row in zip(keys, rows, strict=True)}
    except Exception:  # of another hand: pyarrow and what reads the rows raise anything
        unreadable.append(f"{stage.name}/{files[-1].name}")
        return {}
