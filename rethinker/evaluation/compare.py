"""Results on the same questions side by side: paired differences to the first, with an interval and McNemar's test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from rethinker.config import ConfigError
from rethinker.evaluation.results import aligned, read_result, wilson_interval


@dataclass(frozen=True)
class Comparison:
    """One result, and how it differs from the first: None for the first itself."""

    folder: str
    result: dict[str, Any]
    difference: float | None = None
    """Accuracy minus the first result's."""
    interval: tuple[float, float] | None = None
    """95%, of the difference."""
    p_value: float | None = None
    """McNemar's exact test, two-sided."""
    only_first: int = 0
    """Questions that the first result alone has right."""
    only_this: int = 0


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value that two models on the same questions are equally good.

    Args:
        only_first, only_second: questions that one of them alone answered right; the others say nothing.
    """
    discordant = only_first + only_second
    return float(binomtest(only_first, discordant, 0.5).pvalue) if discordant else 1.0


def paired_difference(both: int, only_first: int, only_second: int, neither: int) -> tuple[float, float, float]:
    """Second model's accuracy minus the first's on the same questions, with a 95% interval: (difference, low, high).

    Source: Newcombe (1998), Statistics in Medicine 17:2635, method 10: Wilson intervals of both accuracies, squared and
    added with their correlation.
    """
    n = both + only_first + only_second + neither
    first, second = both + only_first, both + only_second
    p1, p2 = first / n, second / n
    (low1, high1), (low2, high2) = wilson_interval(first, n), wilson_interval(second, n)
    product = first * (n - first) * second * (n - second)
    covariance = both * neither - only_first * only_second
    if covariance > 0:
        covariance = max(0.0, covariance - n / 2)  # continuity correction
    phi = covariance / sqrt(product) if product else 0.0

    def add(a: float, b: float) -> float:
        return sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))

    difference = p2 - p1
    return difference, difference - add(p2 - low2, high1 - p1), difference + add(high2 - p2, p1 - low1)


def compare_results(folders: Sequence[str | Path]) -> list[Comparison]:
    """Compare results with the first of them, question by question.

    Raises:
        ConfigError: fewer than two folders, a folder without a result, or results on different questions.
    """
    if len(folders) < 2:
        raise ConfigError(f"--compare needs at least two result folders, and got {len(folders)}")
    loaded = [(str(folder), *read_result(folder)) for folder in folders]
    name, baseline, rows = loaded[0]
    first = _verdicts(rows)
    comparisons = [Comparison(name, baseline)]
    for other, result, other_rows in loaded[1:]:
        if result["benchmark"] != baseline["benchmark"]:
            raise ConfigError(
                f"--compare: {name} is on {baseline['benchmark']} and {other} on {result['benchmark']}; compare "
                "results of one benchmark"
            )
        verdicts = _verdicts(other_rows)
        if differing := first.keys() ^ verdicts.keys():
            raise ConfigError(
                f"--compare: {name} ({len(first)} questions) and {other} ({len(verdicts)}) are on different questions: "
                f"one of both lacks {min(key[0] for key in differing)!r}, or has it with another text or answer; "
                "evaluate both with the same --benchmark and --limit"
            )
        pairs = [(first[key], verdicts[key]) for key in first]
        both, only_first = pairs.count((True, True)), pairs.count((True, False))
        only_this, neither = pairs.count((False, True)), pairs.count((False, False))
        difference, *interval = paired_difference(both, only_first, only_this, neither)
        p_value = mcnemar(only_first, only_this)
        comparisons.append(Comparison(other, result, difference, tuple(interval), p_value, only_first, only_this))
    return comparisons


def _verdicts(rows: list[dict[str, Any]]) -> dict[tuple[str, str, tuple[str, ...]], bool]:
    """Whether each question, by its id, text and accepted answers, was answered right."""
    return {(row["query_id"], row["question"], tuple(row["answers"])): row["reward"] >= 1.0 for row in rows}


def describe_comparison(comparisons: Sequence[Comparison]) -> str:
    """The table that the user reads."""
    baseline, between = comparisons[0].result, "{:.3f} to {:.3f}"
    paired = ("difference", "95% interval", "p", "only first", "only this")
    table = [("", "mode", "accuracy", "95% interval", *paired)]
    for entry in comparisons:
        result, cells = entry.result, ("", "", "", "", "")
        if entry.difference is not None:
            interval = "{:+.3f} to {:+.3f}".format(*entry.interval)
            counts = (str(entry.only_first), str(entry.only_this))
            cells = (f"{entry.difference:+.3f}", interval, f"{entry.p_value:.2g}", *counts)
        own = (entry.folder, result["mode"], f"{result['accuracy']:.3f}", between.format(*result["interval"]))
        table.append((*own, *cells))
    lines = [f"{baseline['title']}, the same {baseline['questions']} questions; differences are to the first result"]
    lines += aligned(table)
    lines.append("p: exact McNemar test on the questions that only one of both has right")
    for setting in baseline["settings"]:
        values = {entry.folder: repr(entry.result["settings"].get(setting)) for entry in comparisons}
        if len(set(values.values())) > 1:
            lines.append(f"note: {setting} differs ({', '.join(map(': '.join, values.items()))})")
    return "\n".join(lines)
