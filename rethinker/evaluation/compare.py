"""Results on the same questions side by side: paired differences to the first, with an interval and McNemar's test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from rethinker.config import ConfigError
from rethinker.evaluation.intervals import mcnemar, paired_difference
from rethinker.evaluation.results import read_result
from rethinker.evaluation.settings import ANSWERED


def compare_results(folders: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Compare results with the first of them, question by question.

    Returns:
        What each result.json holds, with its `folder`; all but the first also have `difference` (of accuracies),
        `difference_interval` (95%), `p_value`, and the questions that one alone has right: `only_first`, `only_this`.

    Raises:
        ConfigError: fewer than two folders, a folder without a result, or results on different questions.
    """
    if len(folders) < 2:
        raise ConfigError(f"--compare needs at least two result folders, and got {len(folders)}")
    (base, first), *others = [read_result(folder) for folder in folders]
    compared = [{"folder": str(folders[0]), **base}]
    for folder, (result, this) in zip(folders[1:], others, strict=True):
        if result["benchmark"] != base["benchmark"]:
            raise ConfigError(
                f"--compare: {folders[0]} is on {base['benchmark']} and {folder} on {result['benchmark']}; compare "
                "results of one benchmark"
            )
        if len(differing := first.index.symmetric_difference(this.index)):
            raise ConfigError(
                f"--compare: {folders[0]} ({len(first)} questions) and {folder} ({len(this)}) are on different "
                f"questions: one of both lacks {min(differing)[0]!r}, or has it with another text or answer; evaluate "
                "both with the same --benchmark and --limit"
            )
        this = this.reindex(first.index)
        only_first, only_this = int((first & ~this).sum()), int((this & ~first).sum())
        both, neither = int((first & this).sum()), int((~first & ~this).sum())
        difference, *interval = paired_difference(both, only_first, only_this, neither)
        found = {"difference": difference, "difference_interval": interval, "p_value": mcnemar(only_first, only_this)}
        compared.append({"folder": str(folder), **result, **found, "only_first": only_first, "only_this": only_this})
    return compared


def describe_comparison(compared: Sequence[dict[str, Any]]) -> str:
    """The table that the user reads."""
    base = compared[0]
    table = {}
    for entry in compared:
        cells = [entry["mode"], f"{entry['accuracy']:.3f}", "{:.3f} to {:.3f}".format(*entry["interval"])]
        if entry is not base:
            cells += [f"{entry['difference']:+.3f}", "{:+.3f} to {:+.3f}".format(*entry["difference_interval"])]
            cells += [f"{entry['p_value']:.2g}", str(entry["only_first"]), str(entry["only_this"])]
        table[entry["folder"]] = cells + [""] * (8 - len(cells))
    paired = ["difference", "95% interval", "p", "only first", "only this"]
    lines = [f"{base['title']}, the same {base['questions']} questions; differences are to the first result"]
    lines.append(pd.DataFrame(table, index=["mode", "accuracy", "95% interval", *paired]).T.to_string())
    lines.append("p: exact McNemar test on the questions that only one of both has right")
    alone = any("environment.use" not in entry["settings"] for entry in compared)  # then that is all the difference
    for setting in dict.fromkeys(name for entry in compared for name in entry["settings"]):
        if alone and setting in ANSWERED and setting != "environment.use":
            continue
        values = {entry["folder"]: repr(entry["settings"].get(setting)) for entry in compared}
        if len(set(values.values())) > 1:
            lines.append(f"note: {setting} differs ({', '.join(map(': '.join, values.items()))})")
    return "\n".join(lines)
