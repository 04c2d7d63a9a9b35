"""Training questions in their order without all of them in memory: `data.streaming`.

A data set is read in windows of `data.shuffle_buffer` questions, each shuffled, then drawn. The order is a function of
the seed: the parts of the data set (see `sources`) come in an order of the epoch's own, a window is the next questions
that are trained on, and each window has its own permutation. So a place in the order is a place in the data, where the
window began, and how much of the window is drawn. From there a resumed run reads the window again and goes on with the
very next query; what lies before is not read.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from rethinker.config import ConfigError, DataConfig
from rethinker.data.datasets import Reader, load_queries, repeated_id
from rethinker.data.image_cache import in_its_row
from rethinker.data.mixture import furthest_behind, of_source, source_configs, source_weights, stream_weights
from rethinker.data.query_stream import QueryStream, fingerprint
from rethinker.data.sources import Row, open_table, readable
from rethinker.samples import Query

# Of an epoch: the first window, at no place yet; rows read, questions taken, bad rows by reason, what was wrong first.
_BEGINNING = {"window": 0, "place": None, "rows": 0, "questions": 0, "bad": {}, "first": None}


def open_stream(config: DataConfig, seed: int) -> tuple[QueryStream | StreamedQueries, int | None]:
    """The training questions in their order, and how many there are; None with `data.streaming`, which does not know.

    Raises:
        ConfigError: as `load_queries`; and settings that need all questions, with `data.streaming`.
    """
    if config.streaming:
        return StreamedQueries(config, seed), None
    queries = load_queries(config, "train")
    return QueryStream(queries, seed=seed, **stream_weights(queries, config)), len(queries)


class Windows:
    """The endless order of one data set's queries, a window of them in memory.

    Args:
        config: of the data set.
        seed: of the order.
        prefix: of the ids.
    """

    def __init__(self, config: DataConfig, seed: int, prefix: str = "") -> None:
        self.config, self.seed, self.prefix = config, seed, prefix
        if config.category_weights:
            raise ConfigError(
                f"data.category_weights={config.category_weights} needs all questions by category; with data.streaming "
                "set it to {}, and mix data sets with the weights of data.sources"
            )
        table = open_table(config.train, config.train_split, "data.train", streaming=True)
        self.reader = Reader(config, table, "train", in_its_row)
        self._stream = table.stream.shuffle(seed=seed, buffer_size=1, max_buffer_input_shards=1)  # of its parts
        self._rows: Iterator[Row] | None = None
        self._read({"epoch": 0, "size": None} | _BEGINNING)

    def _read(self, start: dict[str, Any]) -> None:
        """Fill the window that begins there, or the next one that holds a question."""
        self.queries: list[Query] = []  # before others take their place in memory
        while not self.queries:
            self._start, self.drawn = start, 0
            start = self._read_one(start)
        self._next = start

    def _read_one(self, start: dict[str, Any]) -> dict[str, Any]:
        """Fill one window; returns where the next one begins."""
        if self._rows is None:
            self._stream.set_epoch(start["epoch"])
            self._stream.load_state_dict(start["place"])
            self._rows = readable(self._stream, self.reader.where)
        reader, window = self.reader, self.config.shuffle_buffer
        reader.restart(start["rows"], start["bad"], start["first"])
        queries = [replace(q, id=self.prefix + q.id) for q in islice(reader.queries(self._rows), window)]
        ended = len(queries) < window
        if ended:
            reader.check_bad(reader.rows)
        new = ended or not start["window"] or (reader.bad and not start["bad"])
        if new and start["epoch"] == 0:
            reader.report()
        questions = start["questions"] + len(queries)
        if ended and not questions:
            raise reader.nothing()
        self._size = questions if ended else start["size"]
        generator = np.random.default_rng([self.seed, start["epoch"], start["window"]])
        self.queries = [queries[i] for i in generator.permutation(len(queries))]
        self.digest = fingerprint(self.queries)
        if ended:
            self._rows = None
            return {"epoch": start["epoch"] + 1, "size": questions} | _BEGINNING
        return {
            "epoch": start["epoch"],
            "size": start["size"],
            "window": start["window"] + 1,
            "place": self._stream.state_dict(),
            "rows": reader.rows,
            "questions": questions,
            "bad": dict(reader.bad),
            "first": reader.first_bad and str(reader.first_bad),
        }

    def __len__(self) -> int:
        """Questions of an epoch: all of them once its end was seen, until then what is known, or a whole window."""
        return self._size or max(self._start["questions"] + len(self.queries), self.config.shuffle_buffer)

    def next(self) -> Query:
        """The next query."""
        if self.drawn == len(self.queries):
            self._read(self._next)
        self.drawn += 1
        return self.queries[self.drawn - 1]

    def state_dict(self) -> dict[str, Any]:
        """Where the window began and how much of it is drawn."""
        return {"start": self._start, "drawn": self.drawn, "digest": self.digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue there.

        Raises:
            ConfigError: the window holds other questions now.
        """
        if state["start"] != self._start:
            self._rows = None
            self._read(state["start"])
        if state["digest"] != self.digest:
            raise ConfigError(f"{self.reader.where}: its questions are not those of the checkpoint")
        self.drawn = state["drawn"]


class StreamedQueries:
    """What `QueryStream` is for questions in memory: an endless seeded order, and an exact resume.

    With `data.train: sources` the data sets take turns in the shares of their weights, each with windows of its own.

    Raises:
        ConfigError: data that cannot be used, or settings that need all of it.
    """

    def __init__(self, config: DataConfig, seed: int) -> None:
        self.seed = seed
        parts, weights = source_configs(config), source_weights(config)
        if parts and not weights:
            raise ConfigError(
                "data.sources without weights are mixed by size, which data.streaming does not know; give each source "
                "a weight"
            )
        self._shares = {name: weight / sum(weights.values()) for name, weight in weights.items()} or {"": 1.0}
        self._windows: dict[str, Windows] = {}
        for name, part in parts.items():
            with of_source(name):
                self._windows[name] = Windows(part, seed + zlib.crc32(name.encode()), f"{name}/")
        if not parts:
            self._windows[""] = Windows(config, seed)
        self._drawn = dict.fromkeys(self._windows, 0)

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
        columns = {name: sorted(windows.reader.table.columns) for name, windows in self._windows.items()}
        return hashlib.sha256(json.dumps(columns).encode()).hexdigest()

    def keep(self, queries: Iterable[Query]) -> dict[str, Any]:
        """The queries that held samples refer to, for `write_state`: they may have left the window long ago.

        Raises:
            ConfigError: two of them have one id.
        """
        import torch

        kept: dict[str, Query] = {}
        for query in queries:
            same = kept.setdefault(query.id, query)
            # Not by their metadata: what was restored holds them as JSON gave them back.
            if (same.question, same.answer, len(same.images)) != (query.question, query.answer, len(query.images)):
                raise repeated_id(query.id, self._reader_of(query.id).columns)
        images = {i["name"]: i["bytes"] for query in kept.values() for i in query.images if not isinstance(i, str)}
        return {
            "roots": {name: str(windows.reader.root) for name, windows in self._windows.items()},
            "images": {name: torch.frombuffer(bytearray(data), dtype=torch.uint8) for name, data in images.items()},
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
            before, now = state["roots"][self._name_of(fields["id"])], self._reader_of(fields["id"]).root
            images = tuple(
                {"bytes": contents[i[1]], "name": i[1]} if i[0] is None else _moved(i[0], before, now)
                for i in fields["images"]
            )
            given = fields | {"images": images, "metadata": json.loads(fields["metadata"])}
            queries[fields["id"]] = Query(**given)
        return queries

    def _name_of(self, query_id: str) -> str:
        return query_id.partition("/")[0] if "" not in self._windows else ""

    def _reader_of(self, query_id: str) -> Reader:
        return self._windows[self._name_of(query_id)].reader


def _moved(path: str, before: str, now: Path | None) -> str:
    inside = now is not None and path.startswith(before + os.sep)
    return str(now / path[len(before) + 1 :]) if inside else path
