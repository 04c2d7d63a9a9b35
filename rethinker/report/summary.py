"""The tables of the report, of text: what was trained, on what, how far, and which settings were changed."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import pandas as pd

from rethinker.config import Config
from rethinker.evaluation.settings import flat_settings
from rethinker.report.runs import RunRecord, all_stages, whole
from rethinker.settings import flat


def summary(runs: Sequence[RunRecord]) -> pd.DataFrame:
    """One column per run, one row per fact; a row that no run can fill is left out."""
    columns = [run.label for run in runs] if len(runs) > 1 else [runs[0].name]
    facts = pd.DataFrame([_facts(run) for run in runs], index=columns).T
    return facts[facts.ne("").any(axis=1)].rename_axis(columns="Run")


def _facts(run: RunRecord) -> dict[str, str]:
    settings, accuracy, seconds = run.settings, run.series("val_accuracy"), run.series("step_s")
    last = run.metrics.index.max() - sum(run.joins[-1:])
    finished = (run.folder / "learning.png").is_file()  # which a run draws at its end
    so_far = f"{last} of {settings.get('train.max_steps') or '?'} so far (running, or ended early)"
    best = f", best {accuracy.max():.3f} at step {accuracy.idxmax()}" if len(accuracy) > 1 else ""
    time = f"{seconds.sum() / 60:.1f} min in steps, {seconds.median():.2f} s the median step"
    stage = f"stage {len(run.joins) + 1} of {len(run.joins) + 1}, after {', '.join(s.name for s in run.earlier)}"
    return {
        "Stage": stage if run.earlier else "",
        "Model": str(settings.get("policy.model", "")),
        "Algorithm": str(settings.get("algorithm.name", "")),
        "Seed": str(settings.get("seed", "")),
        "Steps": (str(last) if finished else so_far) + (f", after {run.joins[-1]} before" if run.joins else ""),
        "Held-out accuracy": change(accuracy) + best,
        "Sampled reward": change(run.series("reward_mean"), few=max(1, len(run.steps) // 10)),
        "Time": time if len(seconds) else "",
        "Folder": str(run.folder),
    }


def categories(runs: Sequence[RunRecord]) -> pd.DataFrame | None:
    """First and last held-out accuracy by category; None with fewer than two of them."""
    found = {run.label: pd.DataFrame([_by_category(row) for row in run.validations]) for run in runs}
    cells = {label: {name: change(table[name].dropna()) for name in table} for label, table in found.items()}
    table = pd.DataFrame(cells).fillna("").rename_axis(columns="Category")
    return table if len(table) > 1 else None


def _by_category(row: dict[str, Any]) -> dict[str, Any]:
    return {whole(name): value for name, value in (row.get("by_category") or {}).items()}


def changed_settings(runs: Sequence[RunRecord]) -> pd.DataFrame | None:
    """Settings of which any run's value, or an earlier stage's, is not the default; None without a config.yaml."""
    defaults = flat_settings(flat(Config()))
    known = [run for run in all_stages(runs) if run.settings]
    rows = {}
    for key in dict.fromkeys([*defaults, *(key for run in known for key in run.settings)]):
        default = defaults.get(key)
        values = [run.settings.get(key, default) for run in known]
        if key not in ("run.name", "run.dir") and any(value not in (default, {}) for value in values):
            rows[key] = [as_yaml(default) if key in defaults else "none", *map(as_yaml, values)]
    header = ["Default", *(run.label for run in known)]
    return pd.DataFrame(rows, index=header).T.rename_axis(columns="Setting") if rows else None


def change(values: pd.Series, few: int = 1) -> str:
    """First and last value, each the mean of `few`."""
    if len(values) < 2:
        return "".join(f"{value:.3f}" for value in values)
    first, last = values[:few].mean(), values[-few:].mean()
    return f"{first:.3f} to {last:.3f}" + (f" (means of {few} steps)" if few > 1 else "")


def as_yaml(value: Any) -> str:
    """As YAML writes it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def markdown(table: pd.DataFrame) -> str:
    """The table as Markdown, whatever its cells hold."""
    header = [table.columns.name, *table.columns]
    rows = [header, ["---"] * len(header), *table.itertuples()]
    return "\n".join("| " + " | ".join(map(markdown_text, row)) + " |" for row in rows)


def markdown_text(value: Any) -> str:
    """The value in one line of Markdown that shows what it holds and does nothing else."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(str(value).split()))
