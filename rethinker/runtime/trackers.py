"""Where metrics go besides metrics.jsonl: TensorBoard, wandb, trackio. The run goes on without one that fails."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rethinker.config import Config

log = logging.getLogger(__name__)


def numbers_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a metrics row; those of a mapping, such as reward_by_category, are called <metric>/<key>."""
    values = dict(row)
    for name, value in row.items():
        if isinstance(value, Mapping):
            values |= {f"{name}/{key}": inner for key, inner in value.items()}
    return {name: value for name, value in values.items() if type(value) in (int, float)}


class Trackers:
    """The trackers of `run.trackers`; `chart` tells this run from others of its name, and `rows` steps are logged."""

    def __init__(self, config: Config, folder: Path, chart: str, rows: int) -> None:
        self._open = {name: _connect(name, config, folder, chart, rows) for name in config.run.trackers}

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Pass on a step's numbers; a tracker may lose its network or its disk, and metrics.jsonl has everything."""
        for name, tracker in list(self._open.items()):
            try:
                tracker.log(numbers, step=step)
            except Exception as error:
                log.warning("run.trackers: %s failed and is left out from here on: %s", name, error)
                del self._open[name]

    def close(self) -> None:
        """Let them send what they still hold."""
        for name, tracker in self._open.items():
            try:
                tracker.finish()
            except Exception as error:
                log.warning("run.trackers: %s could not be closed: %s", name, error)


class _TensorBoard:
    """TensorBoard with the two functions that runs of wandb and trackio have."""

    def __init__(self, folder: Path, rows: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What a killed run logged after its last checkpoint is hidden: it comes again.
        self._writer = SummaryWriter(str(folder), flush_secs=10, purge_step=rows + 1 if rows else None)
        self.finish = self._writer.close

    def log(self, numbers: dict[str, float], step: int) -> None:
        for metric, value in numbers.items():
            self._writer.add_scalar(metric, value, step)


def _connect(name: str, config: Config, folder: Path, chart: str, rows: int) -> Any:
    if name == "tensorboard":
        return _TensorBoard(folder, rows)
    shown = {"project": "rethinker", "name": config.run.name, "config": dataclasses.asdict(config)}
    if name == "wandb":
        import wandb

        # wandb keeps what it has of steps that come again.
        return wandb.init(**shown, id=f"{config.run.name}-{chart}", resume="allow", dir=str(folder))
    import trackio

    return trackio.init(**shown, resume="allow" if rows else "never")
