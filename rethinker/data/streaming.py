"""Training questions in their order, without all of them in memory: `data.streaming`.

What is in memory are windows of the data (`windows`), and what a checkpoint needs of questions that have left them.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from rethinker.config import ConfigError, DataConfig
from rethinker.data.datasets import load_queries, repeated_id
from rethinker.data.mixture import SOURCES, check_weights, furthest_behind, source_configs, stream_weights
from rethinker.data.query_stream import QueryStream
from rethinker.data.windows import Windows
from rethinker.samples import Query


def open_stream(config: DataConfig, seed: int) -> tuple[QueryStream | StreamedQueries, int | None]:
    """The training questions in their order, and how many there are; None with `data.streaming`, which does not know.

    Raises:
        ConfigError: as `load_queries`; and settings that need all questions, with `data.streaming`.
    """
    if config.streaming:
        return StreamedQueries(config, seed), None
    queries = load_queries(config, "train")
    return QueryStream(queries, seed=seed, **stream_weights(queries, config)), len(queries)


class StreamedQueries:
    """What `QueryStream` is for questions in memory: an endless seeded order, and an exact resume.

    With `data.train: sources` the data sets take turns in the shares of their weights, each with windows of its own.

    Raises:
        ConfigError: data that cannot be used, or settings that need all of it.
    """

    def __init__(self, config: DataConfig, seed: int) -> None:
        self.seed = seed
        if (config.train == SOURCES) != bool(config.sources):
            raise ConfigError(f"data.sources goes with data.train=sources, and data.train is {config.train}; set both")
        if config.train != SOURCES:
            self._shares, self._windows = {"": 1.0}, {"": Windows(config, seed)}
        else:
            parts = source_configs(config)
            weights = {name: entry.get("weight") for name, entry in config.sources.items()}
            if all(weight is None for weight in weights.values()):
                raise ConfigError(
                    "data.sources without weights are mixed by size, which data.streaming does not know; give each "
                    "source a weight"
                )
            weights = check_weights(weights)
            self._shares = {name: weight / sum(weights.values()) for name, weight in weights.items()}
            self._windows = {name: self._source(name, part) for name, part in parts.items()}
        self._drawn = dict.fromkeys(self._windows, 0)

    def _source(self, name: str, config: DataConfig) -> Windows:
        try:
            return Windows(config, self.seed + zlib.crc32(name.encode()), f"{name}/")
        except ConfigError as error:
            raise type(error)(f"data.sources.{name}: {error}") from error

    @property
    def queries(self) -> list[Query]:
        """Those in memory: of the running windows."""
        return [query for windows in self._windows.values() for query in windows.queries]

    def __len__(self) -> int:
        """Queries of an epoch, as far as known."""
        return sum(map(len, self._windows.values()))

    def next(self, n: int) -> list[Query]:
        """The next n queries."""
        return [self._one() for _ in range(n)]

    def _one(self) -> Query:
        name = furthest_behind(self._shares, self._drawn)
        self._drawn[name] += 1
        return self._windows[name].next()

    def state_dict(self) -> dict[str, Any]:
        """Where the order stands: plain values."""
        windows = {name: windows.state_dict() for name, windows in self._windows.items()}
        return {"seed": self.seed, "drawn": dict(self._drawn), "windows": windows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken.

        Raises:
            ConfigError: the state belongs to another seed or to other data.
        """
        if state["seed"] != self.seed:
            raise ConfigError(f"seed: the checkpoint's data order has seed {state['seed']}, this run {self.seed}")
        for name, windows in self._windows.items():
            windows.load_state_dict(state["windows"][name])
        self._drawn = dict(state["drawn"])

    def fingerprint(self) -> str:
        """Of the columns; the questions are compared window by window, when a state is loaded."""
        columns = {name: windows.columns for name, windows in self._windows.items()}
        return hashlib.sha256(json.dumps(columns).encode()).hexdigest()

    def keep(self, queries: Iterable[Query]) -> dict[str, Any]:
        """The queries that held samples refer to, for `write_state`: they may have left the window long ago.

        Raises:
            ConfigError: two of them have one id.
        """
        kept: dict[str, Query] = {}
        for query in queries:
            same = kept.setdefault(query.id, query)
            # Not by their metadata: what was restored holds them as JSON gave them back.
            if (same.question, same.answer, len(same.images)) != (query.question, query.answer, len(query.images)):
                raise repeated_id(query.id, self._windows[self._name_of(query.id)].reader.columns)
        images = {i["name"]: i["bytes"] for query in kept.values() for i in query.images if not isinstance(i, str)}
        return {
            "roots": {name: str(windows.reader.root) for name, windows in self._windows.items()},
            "images": {
                name: torch.frombuffer(bytearray(content), dtype=torch.uint8) for name, content in images.items()
            },
            "queries": [
                {
                    "id": query.id,
                    "question": query.question,
                    "answer": query.answer,
                    "images": [[i] if isinstance(i, str) else [None, i["name"]] for i in query.images],
                    "metadata": json.dumps(query.metadata, default=str),
                }
                for query in kept.values()
            ],
        }

    def kept(self, state: dict[str, Any]) -> dict[str, Query]:
        """The queries by id, of what `keep` gave; images are looked for where the data lies now."""
        contents = {name: bytes(content.numpy()) for name, content in state["images"].items()}
        queries = {}
        for fields in state["queries"]:
            source = self._name_of(fields["id"])
            before, now = state["roots"][source], self._windows[source].reader.root
            images = [
                {"bytes": contents[i[1]], "name": i[1]} if i[0] is None else _moved(i[0], before, now)
                for i in fields["images"]
            ]
            given = fields | {"images": tuple(images), "metadata": json.loads(fields["metadata"])}
            queries[fields["id"]] = Query(**given)
        return queries

    def _name_of(self, query_id: str) -> str:
        return query_id.partition("/")[0] if "" not in self._windows else ""


def _moved(path: str, before: str, now: Path | None) -> str:
    inside = now is not None and path.startswith(before + os.sep)
    return str(now / path[len(before) + 1 :]) if inside else path
