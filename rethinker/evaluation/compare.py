"""Results on the same questions side by side: paired differences to the first, with an interval and McNemar's test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rethinker.config import ConfigError
from rethinker.evaluation.results import aligned, read_result
from rethinker.evaluation.statistics import mcnemar, paired_difference


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
        _check_same(name, first, other, verdicts)
        pairs = [(first[key], verdicts[key]) for key in first]
        both, only_first = pairs.count((True, True)), pairs.count((True, False))
        only_this, neither = pairs.count((False, True)), pairs.count((False, False))
        difference, low, high = paired_difference(both, only_first, only_this, neither)
        p_value = mcnemar(only_first, only_this)
        comparisons.append(Comparison(other, result, difference, (low, high), p_value, only_first, only_this))
    return comparisons


# What makes a question: its id, text and accepted answers.
_Key = tuple[str, str, tuple[str, ...]]


def _verdicts(rows: list[dict[str, Any]]) -> dict[_Key, bool]:
    return {(row["query_id"], row["question"], tuple(row["answers"])): row["reward"] >= 1.0 for row in rows}


def _check_same(name: str, first: dict[_Key, bool], other: str, second: dict[_Key, bool]) -> None:
    if first.keys() == second.keys():
        return
    ours, theirs = {key[0] for key in first}, {key[0] for key in second}
    differences = [
        f"{len(extra)} questions are only in {where} (the first is {min(extra)!r})"
        for where, extra in ((name, ours - theirs), (other, theirs - ours))
        if extra
    ]
    if not differences:
        changed = min(key[0] for key in first.keys() - second.keys())
        differences = [f"question {changed!r} has another text or answer"]
    raise ConfigError(
        f"--compare: {name} ({len(first)} questions) and {other} ({len(second)}) are on different questions: "
        f"{'; '.join(differences)}; evaluate both with the same --benchmark and --limit"
    )


def describe_comparison(comparisons: Sequence[Comparison]) -> str:
    """The table that the user reads."""
    baseline = comparisons[0].result
    paired = ("difference", "95% interval", "p", "only first", "only this")
    table = [("", "mode", "accuracy", "95% interval", *paired)]
    for entry in comparisons:
        low, high = entry.result["interval"]
        cells = [entry.folder, entry.result["mode"], f"{entry.result['accuracy']:.3f}", f"{low:.3f} to {high:.3f}"]
        if entry.difference is None:
            cells += ["", "", "", "", ""]
        else:
            low, high = entry.interval
            cells += [f"{entry.difference:+.3f}", f"{low:+.3f} to {high:+.3f}", f"{entry.p_value:.2g}"]
            cells += [str(entry.only_first), str(entry.only_this)]
        table.append(tuple(cells))
    lines = [f"{baseline['title']}, the same {baseline['questions']} questions; differences are to the first result"]
    lines += aligned(table)
    lines.append("p: exact McNemar test on the questions that only one of both has right")
    for setting in baseline["settings"]:
        values = {str(entry.result["settings"].get(setting)) for entry in comparisons}
        if len(values) > 1:
            shown = ", ".join(f"{e.folder}: {e.result['settings'].get(setting)!r}" for e in comparisons)
            lines.append(f"note: {setting} differs ({shown})")
    return "\n".join(lines)
