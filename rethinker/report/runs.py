"""What the report knows of a run: its settings, its metrics by step, its validations, and a label for figures."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rethinker.config import ConfigError
from rethinker.settings import read_yaml_file


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
    label: str = ""

    @property
    def name(self) -> str:
        """Of the folder: run.name."""
        return self.folder.resolve().name

    @property
    def algorithm(self) -> str | None:
        """grpo, filter or ssr."""
        return self.settings.get("algorithm.name")

    @property
    def last_step(self) -> int:
        """The last optimizer step that was logged."""
        return max(row["step"] for row in self.steps)

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end: then it draws its learning curve."""
        return (self.folder / "learning.png").is_file()

    def series(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps at which the run has the metric, and its values: [steps], [steps]. Others than numbers are left out.

        An accuracy may stand in a step's row, in a validation's, or in both.
        """
        values = {row["step"]: row[metric] for row in self.steps + self.validations if _is_number(row.get(metric))}
        steps = sorted(values)
        return np.array(steps), np.array([values[step] for step in steps], dtype=float)

    def has(self, metric: str) -> bool:
        """Whether the metric is anywhere above zero."""
        return bool((self.series(metric)[1] > 0).any())


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
    steps = _read_lines(file)
    if not any(_is_number(row.get("reward_mean")) for row in steps):
        raise ConfigError(f"{file} has no step with a reward_mean yet, so there is nothing to draw")
    validations = folder / "validation.jsonl"
    run = RunRecord(folder, _read_settings(folder / "config.yaml"), steps, _read_lines(validations))
    return replace(run, label=run.name)


def read_runs(folders: Sequence[str | Path]) -> list[RunRecord]:
    """Read several runs, each once, each with a label of its own.

    A run's label is its `algorithm.name`; runs that share it also give their seed, or else their names.

    Raises:
        ConfigError: as `read_run`.
    """
    runs = [read_run(folder) for folder in {Path(folder).resolve(): folder for folder in folders}.values()]
    runs = [replace(run, label=run.algorithm or run.name) for run in runs]
    for more in (lambda run: f"seed {run.settings.get('seed', '?')}", lambda run: run.name, lambda run: run.folder):
        often = Counter(run.label for run in runs)
        longer = [f"{run.algorithm or 'run'}, {more(run)}" for run in runs]
        runs = [
            run if often[run.label] == 1 else replace(run, label=label) for run, label in zip(runs, longer, strict=True)
        ]
    return runs


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


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _read_settings(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    content = read_yaml_file(file, str(file))
    return flat_settings(content if isinstance(content, dict) else {})


def flat_settings(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys; a setting that is itself a mapping keeps its entries, also dotted."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        nested = isinstance(value, dict) and value
        flat |= flat_settings(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat
