"""What the report knows of a run: its settings, its metrics by step, its validations, and a label for figures.

A run whose policy.model is a checkpoint of another run, `<run>/checkpoints/<name>`, is a later stage of that run: both
are one line over steps, the earlier one's first.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from rethinker.config import ConfigError
from rethinker.evaluation.settings import read_settings
from rethinker.runtime.trackers import numbers_of


@dataclass(frozen=True)
class RunRecord:
    """One run as its folder has it; a run that is still going on, or was killed, has fewer steps."""

    folder: Path
    settings: dict[str, Any]
    """config.yaml with dotted keys; empty where the file is missing."""
    steps: list[dict[str, Any]]
    """Rows of metrics.jsonl, one per optimizer step; those of earlier stages come before them and count first."""
    validations: list[dict[str, Any]]
    """Rows of validation.jsonl, the first from before training (step 0); empty without validation."""
    label: str
    earlier: tuple[RunRecord, ...] = ()
    """The stages that it goes on from, each alone, the first one first."""
    joins: tuple[int, ...] = ()
    """Steps at which the later stages begin."""

    @property
    def name(self) -> str:
        """Of the folder: run.name."""
        return self.folder.resolve().name

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """All that is a number, by step [steps, metrics], those of mappings as <metric>/<key>; NaN elsewhere. An
        accuracy may stand in a step's row, in a validation's, or in both; at a join it is the later stage's."""
        rows = [
            {whole(k): v for k, v in numbers_of(row).items() if abs(v) <= sys.float_info.max}
            for row in self.steps + self.validations
        ]
        table = pd.DataFrame(rows, columns=None if rows else ["step"], dtype=float).groupby("step").last()
        return table.set_index(table.index.astype(int))

    def series(self, metric: str) -> pd.Series:
        """The metric by step, where the run has it."""
        return self.metrics[metric].dropna() if metric in self.metrics else pd.Series(dtype=float)

    def mapping(self, metric: str) -> pd.DataFrame:
        """A metric that is a mapping: a column per key [steps, keys], at the steps where it has any."""
        names = sorted(name for name in self.metrics if name.startswith(f"{metric}/"))
        table = self.metrics[names].dropna(how="all")
        return table.rename(columns={name: name.removeprefix(f"{metric}/") for name in names})


def whole(text: str) -> str:
    """The text with half characters, which a careless cut leaves, replaced: pandas takes none."""
    return text.encode("utf-8", "replace").decode()


def read_run(folder: str | Path) -> RunRecord:
    """Read a run's folder, and those of the runs that it goes on from, where they are still there; its label is its
    name.

    Raises:
        ConfigError: the folder is no run's, it has no step yet, or one of its files is damaged.
    """
    stages = [_read_stage(Path(folder))]
    while (before := _folder_before(stages[0])) and before.resolve() not in {s.folder.resolve() for s in stages}:
        try:
            stages.insert(0, _read_stage(before))
        except (ConfigError, OSError):  # what cannot be read is as good as gone
            break
    steps, validations, ends = [], [], [0]
    for stage in stages:
        for rows, own in ((steps, stage.steps), (validations, stage.validations)):
            rows += [row | {"step": ends[-1] + row["step"]} for row in own]
        ends.append(ends[-1] + int(stage.metrics.index.max()))
    return replace(
        stages[-1], steps=steps, validations=validations, earlier=tuple(stages[:-1]), joins=tuple(ends[1:-1])
    )


def _folder_before(run: RunRecord) -> Path | None:
    """The folder of the run that this one started from: beside this run, as both may have moved, or where it was."""
    model = Path(str(run.settings.get("policy.model", ""))).expanduser()
    if model.parent.name != "checkpoints":
        return None
    for folder in (run.folder.resolve().parent / model.parent.parent.name, model.parent.parent):
        with suppress(OSError):  # of a name that no file can have
            if all((folder / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
                return folder
    return None


def _read_stage(folder: Path) -> RunRecord:
    """One folder, without what came before it."""
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

    A run that another one of them goes on from is part of that one. Runs in stages have their names.

    Raises:
        ConfigError: as `read_run`.
    """
    runs = [read_run(folder) for folder in {Path(folder).resolve(): folder for folder in folders}.values()]
    parts = {stage.folder.resolve() for run in runs for stage in run.earlier}
    runs = [run for run in runs if run.folder.resolve() not in parts]
    choices = [[run.name for run in runs]]
    if not parts:
        choices.insert(0, [str(run.settings.get("algorithm.name", run.name)) for run in runs])
    labels = next((names for names in choices if len(set(names)) == len(runs)), [str(run.folder) for run in runs])
    return [replace(run, label=label) for run, label in zip(runs, labels, strict=True)]


def all_stages(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """The runs and all that they go on from, each once, earlier ones first."""
    return list({stage.folder.resolve(): stage for run in runs for stage in (*run.earlier, run)}.values())


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
