"""Where metrics go besides metrics.jsonl: TensorBoard, wandb, trackio. The run goes on without one that fails."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rethinker.config import Config

log = logging.getLogger(__name__)


class Trackers:
    """The trackers of `run.trackers`, which are installed.

    Args:
        config: the run's settings, which wandb and trackio show.
        folder: the run's.
        chart: what tells this run from others of its name.
        rows: steps that have been logged already, by the run that this one continues.
    """

    def __init__(self, config: Config, folder: Path, chart: str, rows: int) -> None:
        # name -> what takes (numbers, step), and what ends it
        self._open = {name: _connect(name, config, folder, chart, rows) for name in config.run.trackers}

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Pass on a step's numbers."""
        for name, (write, _) in list(self._open.items()):
            if not _done(name, "failed and is left out from here on", write, numbers, step):
                del self._open[name]

    def close(self) -> None:
        """Let them send what they still hold."""
        for name, (_, close) in self._open.items():
            _done(name, "could not be closed", close)


def _done(name: str, problem: str, work: Callable[..., Any], *arguments: Any) -> bool:
    """Whether a tracker did its work: it may lose its network or its disk, and metrics.jsonl has everything."""
    try:
        work(*arguments)
    except Exception as error:
        log.warning("run.trackers: %s %s: %s", name, problem, error)
        return False
    return True


def _connect(
    name: str, config: Config, folder: Path, chart: str, rows: int
) -> tuple[Callable[[dict[str, float], int], Any], Callable[[], Any]]:
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        # What a killed run logged after its last checkpoint is hidden: it comes again.
        writer = SummaryWriter(str(folder), flush_secs=10, purge_step=rows + 1 if rows else None)

        def write(numbers: dict[str, float], step: int) -> None:
            for metric, value in numbers.items():
                writer.add_scalar(metric, value, step)

        return write, writer.close
    shown = {"project": "rethinker", "name": config.run.name, "config": dataclasses.asdict(config)}
    if name == "wandb":
        import wandb

        # wandb keeps what it has of steps that come again.
        run = wandb.init(**shown, id=f"{config.run.name}-{chart}", resume="allow", dir=str(folder))
    else:
        import trackio

        run = trackio.init(**shown, resume="allow" if rows else "never")
    return lambda numbers, step: run.log(numbers, step=step), run.finish
