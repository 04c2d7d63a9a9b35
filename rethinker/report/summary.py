"""The tables at the top of the report: what was trained, on what, how far, and which settings were changed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rethinker.config import Config
from rethinker.report.runs import RunRecord, flat_settings
from rethinker.settings import shipped_recipes


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; the first cell of each row names it."""

    caption: str
    header: list[str]
    rows: list[list[str]]


def summary(runs: Sequence[RunRecord]) -> Table:
    """One column per run, one row per fact; a row that no run can fill is left out."""
    facts = {
        "Model": lambda run: str(run.settings.get("policy.model", "")),
        "Recipe": _recipe,
        "Algorithm": lambda run: run.algorithm or "",
        "Seed": lambda run: str(run.settings.get("seed", "")),
        "Steps": _steps,
        "Held-out accuracy": lambda run: _change(run, "val_accuracy", few=1),
        "Sampled reward": lambda run: _change(run, "reward_mean", few=max(1, len(run.steps) // 10)),
        "Best checkpoint": _best,
        "Time": _time,
        "Folder": lambda run: str(run.folder),
    }
    rows = [[name, *(fact(run) for run in runs)] for name, fact in facts.items()]
    header = ["Run", *(run.label for run in runs)] if len(runs) > 1 else ["Run", runs[0].name]
    return Table("Summary", header, [row for row in rows if any(row[1:])])


def categories(runs: Sequence[RunRecord]) -> Table | None:
    """First and last held-out accuracy by category; None with fewer than two of them."""
    found = [[row["by_category"] for row in run.validations if row.get("by_category")] for run in runs]
    names = list(dict.fromkeys(name for rows in found for row in rows for name in row))
    if len(names) < 2:
        return None
    cells = [[name, *(_of_category(rows, name) for rows in found)] for name in names]
    return Table("Held-out accuracy by category", ["Category", *(run.label for run in runs)], cells)


def changed_settings(runs: Sequence[RunRecord]) -> Table | None:
    """Settings of which any run's value is not the default; None without a config.yaml."""
    defaults = flat_settings(dataclasses.asdict(Config()))
    known = [run for run in runs if run.settings]
    rows = []
    for key in dict.fromkeys([*defaults, *(key for run in known for key in run.settings)]):
        default = defaults.get(key)
        default = list(default) if isinstance(default, tuple) else default  # as YAML gives it back
        values = [run.settings.get(key, default) for run in known]
        if key not in ("run.name", "run.dir") and any(value not in (default, {}) for value in values):
            rows.append([key, _value(default) if key in defaults else "none", *map(_value, values)])
    header = ["Setting", "Default", *(run.label for run in known)]
    return Table("Settings that differ from their defaults", header, rows) if rows else None


def _recipe(run: RunRecord) -> str:
    """The recipe in the name that a run has by default, `<recipe>-<time>`; config.yaml repeats any run."""
    named = re.fullmatch(r"(.+)-\d{8}-\d{6}", str(run.settings.get("run.name") or ""))
    if named and named[1] in shipped_recipes():
        return named[1]
    return "its config.yaml" if run.settings else ""


def _steps(run: RunRecord) -> str:
    whole = run.settings.get("train.max_steps")
    if run.finished:
        return str(run.last_step)
    of = f" of {whole}" if whole else ""
    return f"{run.last_step}{of} so far (running, or ended early)"


def _change(run: RunRecord, metric: str, few: int) -> str:
    """First and last value, each the mean of `few`."""
    _, values = run.series(metric)
    if not values.size:
        return ""
    first, last = values[:few].mean(), values[-few:].mean()
    if values.size == 1:
        return f"{first:.3f}"
    return f"{first:.3f} to {last:.3f}" + (f" (means of {few} steps)" if few > 1 else "")


def _best(run: RunRecord) -> str:
    """As train.py keeps it: the first validation above the one before training, by the highest accuracy."""
    steps, values = run.series("val_accuracy")
    folder = run.folder / "checkpoints"
    if values.size and values.argmax() > 0 and (folder / "best").is_dir():
        return f"checkpoints/best: step {steps[values.argmax()]:.0f}, accuracy {values.max():.3f}"
    if run.finished:
        return "checkpoints/last" + (" (no validation was above the first)" if values.size > 1 else "")
    return "none yet"


def _time(run: RunRecord) -> str:
    _, seconds = run.series("step_s")
    if not seconds.size:
        return ""
    return f"{np.sum(seconds) / 60:.1f} min in steps, {np.median(seconds):.2f} s the median step"


def _of_category(rows: list[dict[str, float]], name: str) -> str:
    values = [row[name] for row in rows if name in row]
    return f"{values[0]:.3f} to {values[-1]:.3f}" if len(values) > 1 else "".join(f"{value:.3f}" for value in values)


def _value(value: Any) -> str:
    """As YAML writes it."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)
