"""What the report knows of a run: its settings, its metrics by step, its validations, and a label for figures."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from rethinker.config import ConfigError
from rethinker.evaluation.settings import read_settings


@dataclass(frozen=True)
class RunRecord:
    """One run as its folder has it; a run that is still going on, or was killed, has fewer steps."""

    folder: Path
    settings: dict[str, Any]
    """config.yaml with dotted keys; empty where the file is missing."""
    steps: list[dict[str, Any]]
    """Rows of metrics.jsonl, one per optimizer step."""
    validations: list[dict[str, Any]]
    """Rows of validation.jsonl, the first from before training (step 0); empty without validation."""
    label: str

    @property
    def name(self) -> str:
        """Of the folder: run.name."""
        return self.folder.resolve().name

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """All that is a number, by step [steps, metrics]; NaN elsewhere. An accuracy may stand in a step's row, in a
        validation's, or in both."""
        rows = [
            {k: v for k, v in row.items() if type(v) in (int, float) and abs(v) <= sys.float_info.max}
            for row in self.steps + self.validations
        ]
        table = pd.DataFrame(rows, columns=None if rows else ["step"], dtype=float).groupby("step").last()
        return table.set_index(table.index.astype(int))

    def series(self, metric: str) -> pd.Series:
        """The metric by step, where the run has it."""
        return self.metrics[metric].dropna() if metric in self.metrics else pd.Series(dtype=float)


def read_run(folder: str | Path) -> RunRecord:
    """Read a run's folder; its label is its name.

    Raises:
        ConfigError: the folder is no run's, it has no step yet, or one of its files is damaged.
    """
    folder = Path(folder)
    file = folder / "metrics.jsonl"
    if not file.is_file():
        below = sorted(path.parent.name for path in folder.glob("*/metrics.jsonl"))
        wanted = f"one of its runs: {', '.join(below[:8])}" if below else "the folder of a run, as runs/<run.name>"
        raise ConfigError(f"{folder} has no metrics.jsonl; name {wanted}")
    steps, validations = _read_lines(file), _read_lines(folder / "validation.jsonl")
    run = RunRecord(folder, read_settings(folder), steps, validations, folder.resolve().name)
    if run.series("reward_mean").empty:
        raise ConfigError(f"{file} has no step with a reward_mean yet, so there is nothing to draw")
    return run


def read_runs(folders: Sequence[str | Path]) -> list[RunRecord]:
    """Read several runs, each once, each with a label of its own: its `algorithm.name`, or else its name or folder.

    Raises:
        ConfigError: as `read_run`.
    """
    runs = [read_run(folder) for folder in {Path(folder).resolve(): folder for folder in folders}.values()]
    choices = ([str(run.settings.get("algorithm.name", run.name)) for run in runs], [run.name for run in runs])
    labels = next((names for names in choices if len(set(names)) == len(runs)), [str(run.folder) for run in runs])
    return [replace(run, label=label) for run, label in zip(runs, labels, strict=True)]


def _read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file, without a last line that a killed run left half-written; [] without the file."""
    if not file.is_file():
        return []
    rows = []
    for number, line in enumerate(file.read_text("utf-8", errors="replace").splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break
        try:
            row = json.loads(line)
            row["step"] = int(row["step"])
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            raise ConfigError(f"{file} line {number} is no JSON object with a step: {line[:60]!r}") from None
        rows.append(row)
    return rows
