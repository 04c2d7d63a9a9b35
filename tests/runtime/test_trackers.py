"""Trackers get a run's settings and numbers, a continued run is one chart, and none of them ends a run.

wandb, trackio, SwanLab and MLflow are stood in for, since they need an account or a server: by functions with their
signatures that refuse what they refuse.
"""

from __future__ import annotations

import posixpath
import re
import sys
from types import SimpleNamespace

import pytest

from rethinker.checkpoint.run_directory import RunDirectory
from rethinker.config import Config, RunConfig
from rethinker.runtime.trackers import Trackers, mlflow_name


@pytest.fixture
def config(tmp_path):
    return Config(run=RunConfig(dir=str(tmp_path / "runs"), name="it's x", trackers=[]))


class SwanLab:
    """swanlab 0.10.3 as far as it is used: `init` (docs.swanlab.cn/en/api/py-init), and what it returns."""

    def __init__(self) -> None:
        self.started, self.steps, self.ends = [], {}, []

    def init(
        self,
        project: str | None = None,
        workspace: str | None = None,
        experiment_name: str | None = None,
        config: dict | None = None,
        logdir: str | None = None,
        mode: str | None = None,
        id: str | None = None,
        resume: str | bool | None = None,
    ):
        assert re.fullmatch(r"[a-z0-9]{21}", id) and resume == "allow" and isinstance(config, dict)
        self.started.append((project, experiment_name, config["seed"], id, logdir))
        return self

    def log(self, data: dict, step: int | None = None) -> None:
        self.steps.setdefault(step, data)  # "duplicate or too old" ones are skipped

    def finish(self, state: str = "success", error: str | None = None, async_log_timeout: int | None = None) -> None:
        assert state in ("success", "crashed", "aborted") and (error is None) == (state == "success")
        self.ends.append(state)


class MLflow:
    """mlflow 3.17 as far as it is used, and its server: names and lengths that it refuses, parameters that stay."""

    def __init__(self) -> None:
        self.runs, self.active = {}, None

    def set_experiment(self, experiment_name: str | None = None, experiment_id: str | None = None):
        assert experiment_name == "rethinker"
        return SimpleNamespace(experiment_id="7")

    def search_runs(
        self,
        experiment_ids: list[str] | None = None,
        filter_string: str = "",
        run_view_type: int = 1,
        max_results: int = 100000,
        order_by: list[str] | None = None,
        output_format: str = "pandas",
    ):
        key, value = re.fullmatch(r"tags\.(\w+) = '([^']*)'", filter_string).groups()
        assert experiment_ids == ["7"] and output_format == "list"
        own = (run for run, what in self.runs.items() if what["tags"].get(key) == value)
        return [SimpleNamespace(info=SimpleNamespace(run_id=run)) for run in own][:max_results]

    def start_run(self, run_id: str | None = None, run_name: str | None = None, tags: dict | None = None):
        assert self.active is None
        if run_id is None:
            run_id = f"run{len(self.runs)}"
            self.runs[run_id] = {"name": run_name, "tags": tags, "params": {}, "metrics": []}
        self.runs[run_id]["status"] = "RUNNING"
        self.active = self.runs[run_id]
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

    def log_params(self, params: dict, synchronous: bool | None = None, run_id: str | None = None) -> None:
        for key, value in params.items():
            assert self.takes(key) and len(str(value)) <= 500
            assert self.active["params"].setdefault(key, str(value)) == str(value), "a parameter is written once"

    def log_metrics(self, metrics: dict, step: int | None = None, synchronous: bool | None = None) -> None:
        assert all(map(self.takes, metrics))
        self.active["metrics"] += [(name, step, value) for name, value in metrics.items()]

    def end_run(self, status: str = "FINISHED") -> None:
        assert status in ("FINISHED", "FAILED", "KILLED")
        self.active["status"], self.active = status, None

    def MlflowClient(self):
        def history(run_id: str, key: str):
            return [SimpleNamespace(step=s, value=v) for name, s, v in self.runs[run_id]["metrics"] if name == key]

        return SimpleNamespace(get_metric_history=history)

    @staticmethod
    def takes(name: str) -> bool:
        """As mlflow/utils/validation.py has it, on Windows too."""
        path = posixpath.normpath(name) == name and name != "." and not name.startswith(("..", "/"))
        return path and bool(re.match(r"^[/\w.\- ]*$", name)) and len(name) <= 250


def log_a_run(config, steps, state=None, failure=None):
    """Log these steps in a folder, as a new run or a continued one; returns what a checkpoint would hold."""
    try:
        with RunDirectory(config) as run:
            run.open_logs(state or {})
            for step in steps:
                by_category = {"(Plane) geometry?": step / 2, "../odd//": 0.5, "none": None}
                run.log({"step": step, "loss": 1 / step, "kl": None, "step_s": 2.0, "by": by_category, "empty": {}})
                if step == steps[0]:
                    saved = run.state_dict()
            if failure:
                raise failure
    except OSError as error:
        assert error is failure
    return saved


def test_swanlab_shows_one_run_however_often_it_continues(config, monkeypatch):
    """Settings, numbers, steps and end arrive; a run that is killed after step 3 and continued from step 1 is one
    experiment, and another run of the same name is another."""
    swanlab = SwanLab()
    monkeypatch.setitem(sys.modules, "swanlab", swanlab)
    config.run.trackers = ["swanlab"]
    saved = log_a_run(config, [1, 2, 3], failure=OSError("lost"))
    config.train.max_steps = 99  # may change when a run is continued
    config.resume = "auto"
    log_a_run(config, [2, 3, 4], saved)
    folder = RunDirectory(config).folder
    project, name, seed, _, logs = swanlab.started[0]
    assert (project, name, seed, logs) == ("rethinker", "it's x", 0, str(folder / "swanlab"))
    assert swanlab.started[1] == swanlab.started[0] and swanlab.ends == ["crashed", "success"]
    assert list(swanlab.steps) == [1, 2, 3, 4]
    assert swanlab.steps[2] == {"loss": 0.5, "step_s": 2.0, "by/(Plane) geometry?": 1.0, "by/../odd//": 0.5}
    config.resume, config.run.dir = None, config.run.dir + "2"
    log_a_run(config, [1])
    assert swanlab.started[2][3] != swanlab.started[0][3]


def test_mlflow_shows_one_run_however_often_it_continues(config, monkeypatch):
    """The run is found by its tag: settings stay as first written, steps that come again are there once, the status is
    the last one; names are made such that the server takes them."""
    mlflow = MLflow()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    config.run.trackers = ["mlflow"]
    config.rethink.triggers = {"long (odd) one?": "x" * 3000}
    saved = log_a_run(config, [1, 2, 3], failure=OSError("lost"))
    assert [run["status"] for run in mlflow.runs.values()] == ["FAILED"]
    config.train.max_steps = 99
    config.resume = "auto"
    log_a_run(config, [2, 3, 4], saved)
    ((_, run),) = mlflow.runs.items()
    assert (run["name"], run["status"]) == ("it's x", "FINISHED")
    assert run["params"]["train.learning_rate"] == str(config.train.learning_rate)
    assert run["params"]["rethink.triggers.long _odd_ one_"] == "x" * 500
    assert [(step, value) for name, step, value in run["metrics"] if name == "loss"] == [
        (1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25)
    ]  # fmt: skip
    assert {name for name, *_ in run["metrics"]} == {"loss", "step_s", "by/_Plane_ geometry_", "by/odd"}
    config.resume, config.run.dir = None, config.run.dir + "2"
    log_a_run(config, [1])
    assert len(mlflow.runs) == 2


NAMES = ["loss", "by/yes/no", "by/../x", "/", "", ".", "a//b", "a/", "(a)?", "Δ 面积", "a:b"]
NAMES += ["n" * 300, "a/" * 200, "/a" * 200, "a/" * 124 + "..b", "..b"]


@pytest.mark.parametrize("name", NAMES)
def test_mlflow_takes_every_name(name):
    """Whatever a category is called, its name is one that MLflow takes; a name that it takes stays."""
    mapped = mlflow_name(name)
    assert MLflow.takes(mapped)
    assert mapped == name or not MLflow.takes(name)


@pytest.mark.parametrize("tracker", ["wandb", "trackio", "swanlab", "mlflow"])
def test_a_tracker_that_cannot_be_opened_does_not_end_the_run(config, monkeypatch, caplog, tracker):
    """No account, no server: named once and left out, and the other trackers go on."""

    def refuse(*args, **options):
        raise RuntimeError("not logged in")

    steps = []
    module = SimpleNamespace(init=refuse, set_experiment=refuse)
    other = SimpleNamespace(log=lambda numbers, step: steps.append(step), finish=lambda: steps.append("end"))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: other))
    monkeypatch.setitem(sys.modules, tracker, module)
    config.run.trackers = [tracker, *(["wandb"] if tracker != "wandb" else [])]
    log_a_run(config, [1, 2])
    assert caplog.text.count(f"{tracker} cannot be opened and is left out: not logged in") == 1
    assert steps == ([] if tracker == "wandb" else [1, 2, "end"])


def test_a_failing_tracker_does_not_end_the_run(config, monkeypatch, caplog):
    """A tracker that loses its server (or its disk) is named once and left out; metrics.jsonl has every step."""
    calls = []

    def lost(numbers, step):
        calls.append(step)
        raise ConnectionError("no route to host")

    module = SimpleNamespace(init=lambda **options: SimpleNamespace(log=lost, finish=lambda: calls.append("closed")))
    monkeypatch.setitem(sys.modules, "wandb", module)
    config.run.trackers = ["wandb"]
    with RunDirectory(config) as run:
        run.open_logs({})
        for step in (1, 2):
            run.log({"step": step, "loss": 0.5})
    assert calls == [1] and caplog.text.count("wandb failed and is left out") == 1
    assert len((run.folder / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_tracker_that_cannot_be_closed_does_not_end_the_run(config, monkeypatch, tmp_path, caplog):
    """Its fault is a line in the log, and the next one is closed all the same."""
    wandb = SimpleNamespace(log=print, finish=lambda: 1 / 0)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: wandb))
    monkeypatch.setitem(sys.modules, "swanlab", swanlab := SwanLab())
    config.run.trackers = ["wandb", "swanlab"]
    Trackers(config, tmp_path, "chart", 0).close(None)
    assert swanlab.ends == ["success"] and "wandb could not be closed: division by zero" in caplog.text


def test_tensorboard_holds_every_number(config):
    """TensorBoard's own reader finds each metric at its step; nulls are left out."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config.run.trackers = ["tensorboard"]
    with RunDirectory(config) as run:
        run.open_logs({})
        run.log({"step": 1, "reward_mean": 0.25, "val_accuracy": None})
        run.log({"step": 2, "reward_mean": 0.5, "val_accuracy": 0.75, "replay_by_category": {"2 terms": 0.5}})
    events = EventAccumulator(str(run.folder)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward_mean")] == [(1, 0.25), (2, 0.5)]
    assert [(e.step, e.value) for e in events.Scalars("val_accuracy")] == [(2, 0.75)]
    assert [(e.step, e.value) for e in events.Scalars("replay_by_category/2 terms")] == [(2, 0.5)]


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_wandb_and_trackio_get_the_same_numbers(config, monkeypatch, tracker):
    """They get settings, numbers, steps and an end."""
    calls = []
    run = SimpleNamespace(
        log=lambda numbers, step: calls.append((step, numbers)), finish=lambda: calls.append("finished")
    )
    module = SimpleNamespace(init=lambda **options: calls.append(options["config"]["seed"]) or run)
    monkeypatch.setitem(sys.modules, tracker, module)
    config.run.trackers = [tracker]
    with RunDirectory(config) as directory:
        directory.open_logs({})
        by_category = {"2 terms": 0.25, "6 terms": None}
        directory.log({"step": 1, "loss": 0.5, "kl": None, "reward_by_category": by_category, "empty": {}})
    assert calls == [0, (1, {"loss": 0.5, "reward_by_category/2 terms": 0.25}), "finished"]
