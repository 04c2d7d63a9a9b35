"""Every completion of an episode as one parquet file, and back: exactly, so that another run can train on them."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rethinker.config import ConfigError
from rethinker.samples import Completion, Group, Query, Rethought

if TYPE_CHECKING:
    import pyarrow

_NUMBERS = ("token_ids", "logprobs", "trainer_logprobs")  # of a completion, as arrays; the last one may be missing


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
    schema = _schema()
    table = pa.Table.from_pylist(rows, schema=pa.schema([field for field in schema if field.name not in _NUMBERS]))
    completions = [completion for group in groups for completion in group.completions]
    for name in _NUMBERS:
        arrays = [getattr(completion, name) for completion in completions]
        table = table.append_column(schema.field(name), _lists(arrays, schema.field(name).type))
    table = table.select(schema.names)
    path = _file(folder, episode)
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

    path = _file(folder, episode)
    try:
        table = pq.read_table(path, schema=_schema())
    except FileNotFoundError:
        raise ConfigError(
            f"rollout.recording={folder} has no {path.name}; it was recorded with fewer episodes"
        ) from None
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).split("\n")[0]
        raise ConfigError(
            f"rollout.recording={folder}: {path.name} is no completions file of a run: {reason}"
        ) from None
    numbers = zip(*(_arrays(table.column(name)) for name in _NUMBERS), strict=True)
    groups: list[Group] = []
    for row, arrays in zip(table.drop_columns(list(_NUMBERS)).to_pylist(), numbers, strict=True):
        if row["index"] == 0:
            groups.append(_group_from(row))
        _add_completion(groups[-1], row, dict(zip(_NUMBERS, arrays, strict=True)))
    return groups


def _lists(arrays: list[np.ndarray | None], kind: pyarrow.ListType) -> pyarrow.ListArray:
    """A column of lists, null for None, without a Python object per number."""
    import pyarrow as pa

    present = [array for array in arrays if array is not None]
    values = np.concatenate([np.zeros(0, kind.value_type.to_pandas_dtype()), *present])
    offsets = np.cumsum([0, *(0 if array is None else len(array) for array in arrays)], dtype=np.int32)
    missing = pa.array([array is None for array in arrays], pa.bool_())
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), type=kind, mask=missing)


def _arrays(column: pyarrow.ChunkedArray) -> list[np.ndarray | None]:
    """The lists of a column; views of one array that is not kept."""
    found: list[np.ndarray | None] = []
    for chunk in column.chunks:
        values, offsets = chunk.values.to_numpy(zero_copy_only=False), chunk.offsets.to_numpy()
        spans = zip(offsets[:-1].tolist(), offsets[1:].tolist(), chunk.is_valid().to_pylist(), strict=True)
        found += [values[start:end] if valid else None for start, end, valid in spans]
    return found


def _file(folder: str | Path, episode: int) -> Path:
    return Path(folder) / file_name(episode)


def file_name(episode: int) -> str:
    """Of an episode's completions; the names sort as the episodes do."""
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
            "logprobs": pa.list_(pa.float64()),  # of fp32 numbers
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


def _add_completion(group: Group, row: Mapping[str, Any], arrays: dict[str, np.ndarray | None]) -> None:
    rethought = row["rethought"] and Rethought(**row["rethought"])
    group.completions.append(
        Completion(text=row["response"], finish_reason=row["finish_reason"], rethought=rethought, **arrays)
    )
    if row["reward"] is not None:
        group.rewards.append(row["reward"])
    if row["advantage"] is not None:
        group.advantages.append(row["advantage"])
