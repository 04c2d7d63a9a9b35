"""The run's folder: settings, one metrics line per optimizer step, every completion, checkpoints, and trackers.

runs/<name>/
  config.yaml                       the resolved settings; `rethinker train config.yaml` repeats the run
  metrics.jsonl                     one object per optimizer step, flushed at once
  validation.jsonl                  one object per validation, the first from before training (step 0)
  completions/episode_00000.parquet one row per completion
  checkpoints/                      model folders that the run is resumed from, too (runtime/checkpoint.py)
  events.out.tfevents.*             TensorBoard
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rethinker.checks import check_new
from rethinker.config import Config, ConfigError
from rethinker.doctor import how_to_install
from rethinker.samples import Completion, Group, Query, Rethought
from rethinker.settings import to_yaml

if TYPE_CHECKING:
    from rethinker.evaluation.validation import Accuracy


class RunDirectory:
    """Opens the folder on entry and closes it on exit; a new run that fails before its first step leaves no folder."""

    def __init__(self, config: Config, enabled: bool = True) -> None:
        """Only look; nothing is written before `with`.

        Args:
            config: where to write (`run`), what to record, and whether to continue (`resume`) what is there.
            enabled: False on all ranks but the first: then nothing is ever written.

        Raises:
            ConfigError: another run has this name, or a tracker is not installed.
        """
        self.folder = Path(config.run.dir).expanduser() / config.run.name
        self.enabled = enabled
        self._config = config
        self._rows = self._episodes = 0
        self._chart = secrets.token_hex(4)  # what wandb knows this run by, however often it is resumed
        self._trackers: list[_Tracker] = []
        if enabled:
            check_new(config)
            for tracker in config.run.trackers:
                if find_spec(tracker) is None:
                    raise ConfigError(f"run.trackers={tracker} is not installed: {how_to_install(tracker)}")

    def __enter__(self) -> RunDirectory:
        if self.enabled:
            self._made = next((p for p in (*reversed(self.folder.parents), self.folder) if not p.exists()), self.folder)
            self._continues = (self.folder / "config.yaml").is_file()
            for name in ("completions", "checkpoints"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            # Every line is one write at the file's end: a reader, or a kill, never meets half of one.
            self._metrics = (self.folder / "metrics.jsonl").open("ab", buffering=0)
            self._validations = (self.folder / "validation.jsonl").open("ab", buffering=0)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if not self.enabled:
            return
        for tracker in self._trackers:
            tracker.close()
        self._metrics.close()
        self._validations.close()
        kept = any(any((self.folder / name).iterdir()) for name in ("completions", "checkpoints"))
        if kind is not None and not self._rows and not self._continues and (kind is ConfigError or not kept):
            shutil.rmtree(self.folder, ignore_errors=True)
            for parent in self.folder.parents:
                if parent.is_relative_to(self._made) and not any(parent.iterdir()):
                    parent.rmdir()

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Append one optimizer step's metrics (`metrics["step"]` counts from 1); a non-finite number becomes null."""
        if not self.enabled:
            return
        row = {name: _plain(value) for name, value in metrics.items()}
        self._append(self._metrics, row)
        self._rows += 1
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "step"}
        for tracker in self._trackers:
            tracker.log(numbers, row["step"])

    def log_validation(self, step: int, accuracy: Accuracy | None) -> None:
        """Append a validation after optimizer step `step`; None (no held-out questions) writes nothing."""
        if self.enabled and accuracy is not None:
            row = {"step": step, "val_accuracy": accuracy.overall, "questions": accuracy.questions}
            self._append(self._validations, row | {"by_category": accuracy.by_category})

    def write_completions(self, episode: int, groups: Sequence[Group]) -> None:
        """Write an episode's completions; an episode written twice is replaced."""
        if self.enabled:
            write_completions(self.folder / "completions", episode, groups)
            self._episodes = episode + 1

    def state_dict(self) -> dict[str, Any]:
        """How far the logs have come, and which chart they are drawn in."""
        if not self.enabled:
            return {}
        logs = {name: os.fstat(file.fileno()).st_size for name, file in self._logs.items()}
        return {"rows": self._rows, "episodes": self._episodes, "chart": self._chart, **logs}

    def open_logs(self, state: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Start the logs, or go back to a position of them: what came later is dropped, to be written again.

        Writes config.yaml and connects to the trackers.

        Args:
            state: from `state_dict`; empty starts from the beginning.

        Returns:
            The steps' metrics up to there.

        Raises:
            ConfigError: a log is shorter than it was.
        """
        if not self.enabled:
            return []
        self._rows, self._chart = state.get("rows", 0), state.get("chart", self._chart)
        self._episodes = state.get("episodes", 0)
        for name, file in self._logs.items():
            size, wanted = os.fstat(file.fileno()).st_size, state.get(name, 0)
            if size < wanted:
                raise ConfigError(
                    f"resume: {self.folder / name} has {size} bytes and had {wanted} when the checkpoint was taken; "
                    "restore the file, or start a new run with another run.name"
                )
            file.truncate(wanted)
        stale = [path for path in (self.folder / "completions").iterdir() if path.name >= _file_name(self._episodes)]
        stale += [self.folder / "learning.png"]  # drawn when a run has ended
        stale += [] if state else self.folder.glob("events.out.tfevents.*")
        for path in stale:
            path.unlink(missing_ok=True)
        partial = self.folder / ".config.yaml.partial"
        partial.write_text(to_yaml(dataclasses.replace(self._config, resume=None)), encoding="utf-8")
        partial.replace(self.folder / "config.yaml")
        for tracker in self._config.run.trackers:
            self._trackers.append(_start_tracker(tracker, self._config, self.folder, self._chart, self._rows))
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    @property
    def _logs(self) -> dict[str, Any]:
        return {"metrics.jsonl": self._metrics, "validation.jsonl": self._validations}

    def _append(self, file: Any, row: Mapping[str, Any]) -> None:
        """One line, in one write.

        Raises:
            ConfigError: the disk is full, or gone.
        """
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        try:
            written = file.write(line)
            if written != len(line):
                raise OSError(f"{written} of {len(line)} bytes were written")
        except OSError as error:
            raise ConfigError(
                f"run.dir={self._config.run.dir}: {Path(file.name).name} cannot be written ({error}); free some space, "
                "then continue the run with --resume auto"
            ) from error


def write_completions(folder: str | Path, episode: int, groups: Sequence[Group]) -> None:
    """Write `folder`/episode_<episode>.parquet: one row per completion, whole or not at all.

    Images given as bytes are stored once per group, in its first row.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        _to_row(episode, number, index, group, completion)
        for number, group in enumerate(groups)
        for index, completion in enumerate(group.completions)
    ]
    table = pa.Table.from_pylist(rows, schema=_schema())
    path = _completions_file(folder, episode)
    partial = path.with_suffix(".partial")
    pq.write_table(table, partial, compression="zstd")
    os.replace(partial, path)


def read_completions(folder: str | Path, episode: int) -> list[Group]:
    """The groups that `write_completions` wrote: token ids, log-probs (NaN included) and texts are exactly the same.

    Raises:
        ConfigError: `rollout.recording` has no such episode, or the file is not one of ours.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = _completions_file(folder, episode)
    try:
        rows = pq.read_table(path, schema=_schema()).to_pylist()
    except FileNotFoundError:
        raise ConfigError(
            f"rollout.recording={folder} has no {path.name}; it was recorded with fewer episodes"
        ) from None
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).split("\n")[0]
        raise ConfigError(
            f"rollout.recording={folder}: {path.name} is no completions file of a run: {reason}"
        ) from None
    groups: list[Group] = []
    for row in rows:
        if row["index"] == 0:
            groups.append(_group_from(row))
        _add_completion(groups[-1], row)
    return groups


def _completions_file(folder: str | Path, episode: int) -> Path:
    return Path(folder) / _file_name(episode)


def _file_name(episode: int) -> str:
    return f"episode_{episode:05d}.parquet"


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema(
        {
            "episode": pa.int64(),
            "group": pa.int64(),  # place of the query in the episode
            "index": pa.int64(),  # place of the completion in its group
            "query_id": pa.string(),
            "question": pa.string(),
            "images": pa.list_(pa.struct({"path": pa.string(), "bytes": pa.binary()})),
            "answer": pa.string(),
            "metadata": pa.string(),  # JSON
            "response": pa.string(),
            "reward": pa.float64(),
            "advantage": pa.float64(),
            "finish_reason": pa.string(),
            "policy_version": pa.int64(),
            "prompt_tokens": pa.int64(),
            "token_ids": pa.list_(pa.int64()),
            "logprobs": pa.list_(pa.float64()),  # wide enough to give back the same Python floats
            "trainer_logprobs": pa.list_(pa.float64()),
            "rethought": pa.struct(
                {
                    "trigger_start": pa.int64(),
                    "trigger_end": pa.int64(),
                    "name": pa.string(),
                    "masked_start": pa.int64(),
                    "masked_end": pa.int64(),
                }
            ),
        }
    )


def _to_row(episode: int, number: int, index: int, group: Group, completion: Completion) -> dict[str, Any]:
    query = group.query
    return {
        "episode": episode,
        "group": number,
        "index": index,
        "query_id": query.id,
        "question": query.question,
        "images": [_image_to_row(image, with_bytes=index == 0) for image in query.images],
        "answer": query.answer,
        "metadata": json.dumps(query.metadata, default=str),
        "response": completion.text,
        "reward": group.rewards[index] if group.rewards else None,
        "advantage": group.advantages[index] if group.advantages else None,
        "finish_reason": completion.finish_reason,
        "policy_version": group.policy_version,
        "prompt_tokens": group.prompt_tokens,
        "token_ids": completion.token_ids,
        "logprobs": completion.logprobs,
        "trainer_logprobs": completion.trainer_logprobs,
        "rethought": completion.rethought and dataclasses.asdict(completion.rethought),
    }


def _image_to_row(image: Any, with_bytes: bool) -> dict[str, Any]:
    if isinstance(image, Mapping):
        return {"path": image.get("path"), "bytes": image.get("bytes") if with_bytes else None}
    return {"path": os.fspath(image), "bytes": None}


def _group_from(row: Mapping[str, Any]) -> Group:
    images = tuple(image["path"] if image["bytes"] is None else image for image in row["images"])
    query = Query(row["query_id"], row["question"], row["answer"], images, json.loads(row["metadata"]))
    return Group(query, [], row["policy_version"], prompt_tokens=row["prompt_tokens"])


def _add_completion(group: Group, row: Mapping[str, Any]) -> None:
    rethought = row["rethought"] and Rethought(**row["rethought"])
    group.completions.append(
        Completion(
            row["token_ids"], row["logprobs"], row["response"], row["finish_reason"], rethought, row["trainer_logprobs"]
        )
    )
    if row["reward"] is not None:
        group.rewards.append(row["reward"])
    if row["advantage"] is not None:
        group.advantages.append(row["advantage"])


@dataclasses.dataclass(frozen=True)
class _Tracker:
    log: Callable[[dict[str, float], int], None]
    close: Callable[[], None]


def _start_tracker(name: str, config: Config, folder: Path, chart: str, rows: int) -> _Tracker:
    """`rows` steps have been logged already, by the run that this one continues."""
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        # What a killed run logged after its last checkpoint is hidden: it comes again.
        writer = SummaryWriter(str(folder), flush_secs=10, purge_step=rows + 1 if rows else None)

        def write(numbers: dict[str, float], step: int) -> None:
            for metric, value in numbers.items():
                writer.add_scalar(metric, value, step)

        return _Tracker(write, writer.close)
    settings = dataclasses.asdict(config)
    if name == "wandb":
        import wandb

        # wandb keeps what it has of steps that come again.
        run = wandb.init(
            project="rethinker",
            name=config.run.name,
            id=f"{config.run.name}-{chart}",
            resume="allow",
            dir=str(folder),
            config=settings,
        )
        return _Tracker(lambda numbers, step: run.log(numbers, step=step), run.finish)
    import trackio

    run = trackio.init(project="rethinker", name=config.run.name, config=settings, resume="allow" if rows else "never")
    return _Tracker(lambda numbers, step: run.log(numbers, step=step), run.finish)


def _plain(value: Any) -> Any:
    """A number as JSON knows it: scalars of NumPy and torch unwrapped, nothing non-finite."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
