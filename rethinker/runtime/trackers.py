"""Where metrics go besides metrics.jsonl: TensorBoard, wandb, trackio, SwanLab, MLflow. A run goes on without any."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rethinker.config import Config, one_line

log = logging.getLogger(__name__)

PROJECT = "rethinker"
"""Of all runs, where a tracker sorts them into projects (MLflow: experiments)."""


def numbers_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a metrics row; those of a mapping, such as reward_by_category, are called <metric>/<key>."""
    values = dict(row)
    for name, value in row.items():
        if isinstance(value, Mapping):
            values |= {f"{name}/{key}": inner for key, inner in value.items()}
    return {name: value for name, value in values.items() if type(value) in (int, float)}


class Trackers:
    """The trackers of `run.trackers`; `chart` tells this run from others of its name, and `rows` steps are logged.

    One that cannot be reached, or is lost later (with its network or its disk), is named once and left out:
    metrics.jsonl has everything.
    """

    def __init__(self, config: Config, folder: Path, chart: str, rows: int) -> None:
        self._open: dict[str, Any] = {}
        for name in config.run.trackers:
            try:
                self._open[name] = _connect(name, config, folder, chart, rows)
            except Exception as error:
                log.warning("run.trackers: %s cannot be opened and is left out: %s", name, error)

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Pass on a step's numbers."""
        for name, tracker in list(self._open.items()):
            try:
                tracker.log(numbers, step=step)
            except Exception as error:
                log.warning("run.trackers: %s failed and is left out from here on: %s", name, error)
                del self._open[name]

    def close(self, failure: BaseException | None) -> None:
        """Let them send what they still hold; SwanLab and MLflow also show whether the run failed."""
        for name, tracker in self._open.items():
            try:
                if failure and name == "swanlab":
                    tracker.finish(state="crashed", error=one_line(failure))
                elif failure and name == "mlflow":
                    tracker.finish(status="FAILED")
                else:
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


class _MLflow:
    """MLflow with these two functions, too. Its server names a run, so a continued one is found by a tag."""

    def __init__(self, name: str, config: dict[str, Any], chart: str) -> None:
        import mlflow

        experiment = mlflow.set_experiment(PROJECT).experiment_id
        asked = f"tags.rethinker_chart = '{chart}'"
        found = mlflow.search_runs([experiment], filter_string=asked, max_results=1, output_format="list")
        self._logged = 0  # steps that come again are kept as they are: MLflow would show both
        if found:
            run = mlflow.start_run(run_id=found[0].info.run_id)
            history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "step_s")
            self._logged = max((metric.step for metric in history), default=0)
        else:
            mlflow.start_run(run_name=name, tags={"rethinker_chart": chart})
            # A parameter cannot be changed later, and older servers take 500 characters.
            mlflow.log_params({mlflow_name(key): str(value)[:500] for key, value in _flat(config).items()})
        self._mlflow, self.finish = mlflow, mlflow.end_run

    def log(self, numbers: dict[str, float], step: int) -> None:
        if step > self._logged:
            self._mlflow.log_metrics({mlflow_name(name): value for name, value in numbers.items()}, step=step)


def mlflow_name(name: str) -> str:
    """A metric's or a setting's name as MLflow takes it: letters, digits, `_`, `-`, `.`, spaces, and `/` as in a path.
    Other characters become `_`, parts that are empty or dots alone and dots in front are left out, and what is too long
    is cut."""
    parts = re.sub(r"[^/\w.\- ]", "_", name[:250]).split("/")
    return "/".join(part for part in parts if part.strip(".")).lstrip(".") or "_"


def _flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of settings."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat


def _connect(name: str, config: Config, folder: Path, chart: str, rows: int) -> Any:
    if name == "tensorboard":
        return _TensorBoard(folder, rows)
    settings, run = dataclasses.asdict(config), f"{config.run.name}-{chart}"
    letters = hashlib.sha256(run.encode()).hexdigest()[:21]  # as many as SwanLab's own ids have
    if name == "mlflow":
        return _MLflow(config.run.name, settings, letters)
    if name == "swanlab":
        import swanlab

        shown = {"project": PROJECT, "experiment_name": config.run.name, "config": settings}
        return swanlab.init(**shown, id=letters, resume="allow", logdir=str(folder / "swanlab"))
    shown = {"project": PROJECT, "name": config.run.name, "config": settings}
    if name == "wandb":
        import wandb

        # wandb keeps what it has of steps that come again.
        return wandb.init(**shown, id=run, resume="allow", dir=str(folder))
    import trackio

    return trackio.init(**shown, resume="allow" if rows else "never")
