"""The run's folder: settings, one metrics line per optimizer step, every completion, checkpoints, and trackers.

runs/<name>/
  config.yaml                       the resolved settings; `rethinker train config.yaml` repeats the run
  metrics.jsonl                     one object per optimizer step, flushed at once
  validation.jsonl                  one object per validation, the first from before training (step 0)
  completions/episode_00000.parquet one row per completion
  checkpoints/                      models in Hugging Face format
  events.out.tfevents.*             TensorBoard
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
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
    """Opens the folder on entry and closes it on exit; a run that fails before its first step leaves no folder."""

    def __init__(self, config: Config, enabled: bool = True) -> None:
        """Only look; nothing is written before `with`.

        Args:
            config: where to write (`run`) and what to record.
            enabled: False on all ranks but the first: then nothing is ever written.

        Raises:
            ConfigError: another run has this name, or a tracker is not installed.
        """
        self.folder = Path(config.run.dir).expanduser() / config.run.name
        self.enabled = enabled
        self._config = config
        self._rows = 0
        self._trackers: list[_Tracker] = []
        if enabled:
            check_new(config)
            for tracker in config.run.trackers:
                if find_spec(tracker) is None:
                    raise ConfigError(f"run.trackers={tracker} is not installed: {how_to_install(tracker)}")

    def __enter__(self) -> RunDirectory:
        if self.enabled:
            self._made = next((p for p in (*reversed(self.folder.parents), self.folder) if not p.exists()), self.folder)
            for name in ("completions", "checkpoints"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            (self.folder / "config.yaml").write_text(to_yaml(self._config), encoding="utf-8")
            self._metrics = (self.folder / "metrics.jsonl").open("w", encoding="utf-8")
            try:
                for tracker in self._config.run.trackers:
                    self._trackers.append(_start_tracker(tracker, self._config, self.folder))
            except BaseException as error:
                self.__exit__(type(error), error, None)
                raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if not self.enabled:
            return
        for tracker in self._trackers:
            tracker.close()
        self._metrics.close()
        kept = any(any((self.folder / name).iterdir()) for name in ("completions", "checkpoints"))
        if kind is not None and not self._rows and (kind is ConfigError or not kept):
            shutil.rmtree(self.folder, ignore_errors=True)
            for parent in self.folder.parents:
                if parent.is_relative_to(self._made) and not any(parent.iterdir()):
                    parent.rmdir()

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Append one optimizer step's metrics (`metrics["step"]` counts from 1); a non-finite number becomes null."""
        if not self.enabled:
            return
        row = {name: _plain(value) for name, value in metrics.items()}
        self._metrics.write(json.dumps(row, allow_nan=False) + "\n")
        self._metrics.flush()
        self._rows += 1
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "step"}
        for tracker in self._trackers:
            tracker.log(numbers, row["step"])

    def log_validation(self, step: int, accuracy: Accuracy | None) -> None:
        """Append a validation after optimizer step `step`; None (no held-out questions) writes nothing."""
        if self.enabled and accuracy is not None:
            row = {"step": step, "val_accuracy": accuracy.overall, "questions": accuracy.questions}
            with (self.folder / "validation.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row | {"by_category": accuracy.by_category}) + "\n")

    def write_completions(self, episode: int, groups: Sequence[Group]) -> None:
        """Write an episode's completions; an episode written twice is replaced."""
        if self.enabled:
            write_completions(self.folder / "completions", episode, groups)

    def state_dict(self) -> dict[str, int]:
        """How far the log has come."""
        return {"rows": self._rows, "metrics_bytes": self._metrics.tell() if self.enabled else 0}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go back to a position of this folder's log: later lines are dropped, to be written again."""
        if self.enabled:
            self._metrics.seek(state["metrics_bytes"])
            self._metrics.truncate()
            self._rows = state["rows"]


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
    return Path(folder) / f"episode_{episode:05d}.parquet"


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


def _start_tracker(name: str, config: Config, folder: Path) -> _Tracker:
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder), flush_secs=10)

        def write(numbers: dict[str, float], step: int) -> None:
            for metric, value in numbers.items():
                writer.add_scalar(metric, value, step)

        return _Tracker(write, writer.close)
    settings = dataclasses.asdict(config)
    if name == "wandb":
        import wandb

        run = wandb.init(project="rethinker", name=config.run.name, dir=str(folder), config=settings)
        return _Tracker(lambda numbers, step: run.log(numbers, step=step), run.finish)
    import trackio

    run = trackio.init(project="rethinker", name=config.run.name, config=settings)
    return _Tracker(lambda numbers, step: run.log(numbers, step=step), run.finish)


def _plain(value: Any) -> Any:
    """A number as JSON knows it: scalars of NumPy and torch unwrapped, nothing non-finite."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
