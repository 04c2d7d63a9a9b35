"""Every completion of an episode as one parquet file, and back: exactly, so that another run can train on them.

The greedy answers of a validation have the same format.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rethinker.config import ConfigError, one_line
from rethinker.runtime.files import whole_file
from rethinker.samples import Completion, Group, Observed, Query, Rethought

_NUMBERS = ("token_ids", "logprobs", "trainer_logprobs")  # of a completion, as arrays; the last one may be missing


def file_name(episode: int) -> str:
    """Of an episode's completions; the names sort as the episodes do."""
    return f"episode_{episode:05d}.parquet"


def validation_name(step: int) -> str:
    """Of the greedy answers after a step; the names sort as the steps do."""
    return f"step_{step:06d}.parquet"


def write_completions(folder: str | Path, episode: int, groups: Sequence[Group]) -> None:
    """Write `folder`/episode_<episode>.parquet: see `write_groups`."""
    write_groups(Path(folder) / file_name(episode), groups, episode)


def write_groups(file: Path, groups: Sequence[Group], episode: int = 0) -> None:
    """Write one row per completion, the file whole or not at all.

    Images given as bytes are stored once per group, in its first row.
    """
    rows = [
        _to_row(episode, number, index, group, completion)
        for number, group in enumerate(groups)
        for index, completion in enumerate(group.completions)
    ]
    with whole_file(file) as partial:
        pq.write_table(pa.Table.from_pylist(rows, schema=_schema()), partial, compression="zstd")


def read_completions(folder: str | Path, episode: int) -> list[Group]:
    """The groups that `write_completions` wrote: token ids, log-probs (NaN included) and texts are exactly the same.

    Raises:
        ConfigError: `rollout.recording` has no such episode, or the file is not one of ours.
    """
    name = file_name(episode)
    try:
        table = pq.read_table(Path(folder) / name, schema=_schema())
    except FileNotFoundError:
        raise ConfigError(f"rollout.recording={folder} has no {name}; it was recorded with fewer episodes") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError(
            f"rollout.recording={folder}: {name} is no completions file of a run: {one_line(error)}"
        ) from None
    numbers = zip(*(table.column(name).to_numpy() for name in _NUMBERS), strict=True)  # an array of arrays each
    groups: list[Group] = []
    for row, arrays in zip(table.drop_columns(list(_NUMBERS)).to_pylist(), numbers, strict=True):
        if row["index"] == 0:
            images = tuple(image["path"] if image["bytes"] is None else image for image in row["images"])
            query = Query(row["query_id"], row["question"], row["answer"], images, json.loads(row["metadata"]))
            groups.append(Group(query, [], row["policy_version"], prompt_tokens=row["prompt_tokens"]))
        rethought = row["rethought"] and Rethought(**row["rethought"])
        observed = tuple(
            Observed(
                **part | {"images": tuple({"bytes": png} for png in part["images"]), "failures": (*part["failures"],)}
            )
            for part in row["observed"] or ()
        )
        ends = {"text": row["response"], "finish_reason": row["finish_reason"]}
        ends |= {"rethought": rethought, "observed": observed}
        groups[-1].completions.append(Completion(**dict(zip(_NUMBERS, arrays, strict=True)), **ends))
        groups[-1].rewards += [] if row["reward"] is None else [row["reward"]]
        for name, value in row["scores"] or ():
            groups[-1].scores.setdefault(name, []).append(value)
        groups[-1].advantages += [] if row["advantage"] is None else [row["advantage"]]
    return groups


def _schema() -> Any:
    number, real, text = pa.int64(), pa.float64(), pa.string()
    span = {"trigger_start": number, "trigger_end": number, "name": text, "masked_start": number, "masked_end": number}
    observed = {"start": number, "end": number, "place": number, "text": text, "images": pa.list_(pa.binary())}
    observed |= {"reward": real, "calls": number, "failures": pa.list_(text)}
    columns = {
        "episode": number,
        "group": number,  # place of the query in the episode
        "index": number,  # place of the completion in its group
        "query_id": text,
        "question": text,
        "images": pa.list_(pa.struct({"path": text, "bytes": pa.binary()})),
        "answer": text,
        "metadata": text,  # JSON
        "response": text,
        "reward": real,
        "scores": pa.map_(text, real),  # of each reward function, in their order
        "advantage": real,
        "finish_reason": text,
        "policy_version": number,
        "prompt_tokens": number,
        "token_ids": pa.list_(number),
        "logprobs": pa.list_(real),  # of fp32 numbers
        "trainer_logprobs": pa.list_(real),
        "rethought": pa.struct(span),
        "observed": pa.list_(pa.struct(observed)),
    }
    return pa.schema(columns)


def _to_row(episode: int, number: int, index: int, group: Group, completion: Completion) -> dict[str, Any]:
    query, scores = group.query, completion.trainer_logprobs
    images = [image if isinstance(image, Mapping) else {"path": os.fspath(image)} for image in query.images]
    if index:
        images = [{**image, "bytes": None} for image in images]
    return {
        "episode": episode,
        "group": number,
        "index": index,
        "query_id": query.id,
        "question": query.question,
        "images": images,
        "answer": query.answer,
        "metadata": json.dumps(query.metadata, default=str),
        "response": completion.text,
        "reward": group.rewards[index] if group.rewards else None,
        "scores": [(name, values[index]) for name, values in group.scores.items()],
        "advantage": group.advantages[index] if group.advantages else None,
        "finish_reason": completion.finish_reason,
        "policy_version": group.policy_version,
        "prompt_tokens": group.prompt_tokens,
        # Arrays of the column's type: pyarrow takes them whole, without a Python object per number.
        "token_ids": completion.token_ids.astype(np.int64),
        "logprobs": completion.logprobs.astype(np.float64),
        "trainer_logprobs": None if scores is None else scores.astype(np.float64),
        "rethought": completion.rethought and dataclasses.asdict(completion.rethought),
        "observed": [
            vars(part) | {"images": [image["bytes"] for image in part.images]} for part in completion.observed
        ],
    }
