"""The run's folder: settings, one metrics line per optimizer step, every completion, checkpoints, and trackers.

runs/<name>/
  config.yaml                       the resolved settings; `rethinker train config.yaml` repeats the run
  metrics.jsonl                     one object per optimizer step, flushed at once
  validation.jsonl                  one object per validation, the first from before training (step 0)
  completions/episode_00000.parquet one row per completion
  validation/step_000000.parquet    greedy answers to the first held-out questions, in the same columns
  checkpoints/                      model folders that the run is resumed from, too (checkpoint/checkpoint.py)
  events.out.tfevents.*             TensorBoard
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rethinker.checks import check_new
from rethinker.config import Config, ConfigError
from rethinker.runtime.completions import file_name, validation_name, write_completions, write_groups
from rethinker.runtime.files import whole_file
from rethinker.runtime.trackers import Trackers, numbers_of
from rethinker.samples import Accuracy, Group
from rethinker.settings import to_yaml

LOGS = ("metrics.jsonl", "validation.jsonl")


class RunDirectory:
    """Opens the folder on entry and closes it on exit; an error before anything is kept in a new one removes it."""

    def __init__(self, config: Config, enabled: bool = True) -> None:
        """Only look; nothing is written before `with`, and with enabled=False (on all ranks but the first) never.

        Raises:
            ConfigError: another run has this name.
        """
        self.folder = Path(config.run.dir).expanduser() / config.run.name
        self.enabled = enabled
        self._config = config
        self._rows = self._episodes = 0
        self._chart = secrets.token_hex(4)  # what trackers know this run by, however often it is resumed
        self._trackers: Trackers | None = None
        if enabled:
            check_new(config)

    def __enter__(self) -> RunDirectory:
        if self.enabled:
            self._continues = (self.folder / "config.yaml").is_file()
            try:
                for name in ("completions", "checkpoints"):
                    (self.folder / name).mkdir(parents=True, exist_ok=True)
                # Every line is one write at the file's end; a reader takes what ends with a line break.
                self._logs = {name: (self.folder / name).open("ab", buffering=0) for name in LOGS}
            except OSError as error:
                if not self._continues:
                    shutil.rmtree(self.folder, ignore_errors=True)
                raise ConfigError(
                    f"run.dir={self._config.run.dir}: the run's folder cannot be written ({error}); choose another"
                ) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if not self.enabled:
            return
        if self._trackers:
            self._trackers.close(error)
        for file in self._logs.values():
            file.close()
        kept = any(any((self.folder / name).iterdir()) for name in ("completions", "checkpoints"))
        if kind and not (self._rows or self._continues or kept):
            shutil.rmtree(self.folder, ignore_errors=True)

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Append one optimizer step's metrics (`metrics["step"]` counts from 1); a non-finite number becomes null."""
        if not self.enabled:
            return
        row = _plain(metrics)
        self._append("metrics.jsonl", row)
        self._rows += 1
        self._trackers.log({name: value for name, value in numbers_of(row).items() if name != "step"}, row["step"])

    def log_validation(self, step: int, accuracy: Accuracy) -> None:
        """Append a validation after optimizer step `step`."""
        if self.enabled:
            row = {"step": step, "val_accuracy": accuracy.overall, "questions": accuracy.questions}
            row |= {"by_category": accuracy.by_category, "right": accuracy.right, "asked": accuracy.asked}
            self._append("validation.jsonl", row)

    def write_completions(self, episode: int, groups: Sequence[Group]) -> None:
        """Write an episode's completions; an episode written twice is replaced.

        Raises:
            ConfigError: the disk is full, or gone.
        """
        if self.enabled:
            try:
                write_completions(self.folder / "completions", episode, groups)
            except OSError as error:
                raise self._unwritable(file_name(episode), error) from error
            self._episodes = episode + 1

    def write_validation(self, step: int, groups: Sequence[Group]) -> None:
        """Write the greedy answers of a validation after optimizer step `step`; those written before are replaced.

        Raises:
            ConfigError: the disk is full, or gone.
        """
        if self.enabled:
            file = self.folder / "validation" / validation_name(step)
            try:
                file.parent.mkdir(exist_ok=True)
                write_groups(file, groups)
            except OSError as error:
                raise self._unwritable(file.name, error) from error

    def state_dict(self) -> dict[str, Any]:
        """How far the logs have come, and which chart they are drawn in."""
        if not self.enabled:
            return {}
        sizes = {name: file.seek(0, os.SEEK_END) for name, file in self._logs.items()}
        return {"rows": self._rows, "episodes": self._episodes, "chart": self._chart, **sizes}

    def open_logs(self, state: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Start the logs, or go back to a position of them: what came later is dropped, to be written again.

        Writes config.yaml, connects to the trackers, and returns the steps' metrics up to there. An empty state is the
        beginning.

        Raises:
            ConfigError: a log is shorter than it was.
        """
        if not self.enabled:
            return []
        self._rows, self._chart = state.get("rows", 0), state.get("chart", self._chart)
        self._episodes = state.get("episodes", 0)
        for name, file in self._logs.items():
            size, wanted = file.seek(0, os.SEEK_END), state.get(name, 0)
            if size < wanted:
                raise ConfigError(
                    f"resume: {self.folder / name} has {size} bytes and had {wanted} when the checkpoint was taken; "
                    "restore the file, or start a new run with another run.name"
                )
            file.truncate(wanted)
        written = (self.folder / "completions").iterdir()
        stale = [path for path in written if path.name >= file_name(self._episodes) or path.suffix == ".partial"]
        validations = (self.folder / "validation").glob("*.p*")
        last = validation_name(self._rows)
        stale += [path for path in validations if path.name > last or path.suffix == ".partial"]
        stale += [self.folder / "learning.png"]  # drawn when a run has ended
        stale += [] if state else self.folder.glob("events.out.tfevents.*")
        for path in stale:
            path.unlink(missing_ok=True)
        with whole_file(self.folder / "config.yaml") as partial:
            partial.write_text(to_yaml(dataclasses.replace(self._config, resume=None)), encoding="utf-8")
        self._trackers = Trackers(self._config, self.folder, self._chart, self._rows)
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        """One line, in one write.

        Raises:
            ConfigError: the disk is full, or gone.
        """
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        try:
            written = self._logs[name].write(line)
            if written != len(line):
                raise OSError(f"{written} of {len(line)} bytes were written")
        except OSError as error:
            raise self._unwritable(name, error) from error

    def _unwritable(self, name: str, error: OSError) -> ConfigError:
        return ConfigError(
            f"run.dir={self._config.run.dir}: {name} cannot be written ({error}); free some space, then continue the "
            "run with --resume auto"
        )


def _plain(value: Any) -> Any:
    """A number as JSON knows it: scalars of NumPy and torch unwrapped, nothing non-finite; in mappings, too."""
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
