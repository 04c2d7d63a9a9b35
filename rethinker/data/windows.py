"""The questions of one data set that is not held: read in windows of `data.shuffle_buffer`, each shuffled, then drawn.

The order is a function of the seed: the parts of the data set come in an order of the epoch's own (`streamed_rows`), a
window is the next questions that are trained on, and each window has its own permutation. So a place in the order is a
place in the data, where the window began, and how much of the window is drawn. From there a resumed run reads the
window again and goes on with the very next query; what lies before is not read.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rethinker.config import ConfigError, DataConfig
from rethinker.data.datasets import (
    BUILT_IN,
    SPLIT,
    BadRowError,
    RowReader,
    find_columns,
    image_root,
    repeated_id,
)
from rethinker.data.faults import Faults
from rethinker.data.image_cache import InRows
from rethinker.data.query_stream import fingerprint
from rethinker.data.streamed_rows import StreamedTable, open_stream_of_rows
from rethinker.data.subsets import image_name, side_of, why_not
from rethinker.samples import Query

log = logging.getLogger(__name__)

# Of an epoch: the first window, at no place yet; rows read, questions taken, bad rows by reason, what was wrong first.
_BEGINNING = {"window": 0, "place": None, "rows": 0, "questions": 0, "bad": {}, "first": None}


def held_out(config: DataConfig, most: int | None) -> list[Query]:
    """With data.validation=split: the first `most` questions of the data that are held out, in its own order.

    Raises:
        ConfigError: there are none.
    """
    table = _open(config)
    reader, questions = _Reader(config, table), []
    faults = Faults(config.max_bad_rows, 0)
    for number, row in enumerate(table.in_order(), start=1):
        faults.rows(max(number, config.shuffle_buffer))
        query = reader.query(number, row, faults, side="validation")
        if query is not None:
            questions.append(query)
        if len(questions) == most:
            break
    if not questions:
        raise ConfigError(
            f"data.validation_share={config.validation_share:g}: no question of {table.where} falls to validation; "
            "raise it"
        )
    return questions


def _open(config: DataConfig) -> StreamedTable:
    if config.train in BUILT_IN:
        raise ConfigError(
            f"data.train={config.train} comes with a package and is held anyway; set data.streaming=false"
        )
    if config.category_weights:
        raise ConfigError(
            f"data.category_weights={config.category_weights} needs all questions by category; with data.streaming set "
            "it to {}, and mix data sets with the weights of data.sources"
        )
    return open_stream_of_rows(config.train, config.train_split, "data.train")


class _Reader:
    """Rows to the queries that one side of the data set takes."""

    def __init__(self, config: DataConfig, table: StreamedTable) -> None:
        self.config, self.where = config, table.where
        self.columns = find_columns(config, table.columns, self.where)
        for noun in ("images", "id"):  # a row that no schema announced may still have them
            self.columns.setdefault(noun, {**DataConfig().fields, **config.fields}[noun])
        renamed = {column: noun for noun, column in self.columns.items()}
        known = [renamed.get(column, column) for column in table.columns]
        if config.pass_rate is not None and config.pass_rate not in known:
            raise ConfigError(
                f"data.pass_rate={config.pass_rate}: {self.where} has no such column, but {', '.join(map(str, known))}"
            )
        self.root = Path(config.image_root) if config.image_root else table.folder
        self.left_out: Counter[str] = Counter()
        self.new_window()

    def new_window(self) -> None:
        """Forget the ids and the files seen so far."""
        self.ids: set[str] = set()
        self._rows = RowReader(self.where, self.columns, self.root)
        self._rows.embedded = InRows()

    def query(self, number: int, row: dict[str, Any] | ConfigError, faults: Faults, side: str) -> Query | None:
        """The row's query; None for a bad row, which is counted, and for one that is not of this side.

        Raises:
            ConfigError: one bad row too many.
        """
        if isinstance(row, ConfigError):
            faults.add("damaged row", row)
            return None
        try:
            query = self._rows.query(f"{number} (as read)", row)
            if row.get(self.columns["id"]) is None:
                query = replace(query, id=self._content_id(query))
            elif query.id in self.ids:
                raise repeated_id(query.id, self.columns)
        except BadRowError as error:
            faults.add(error.reason, ConfigError(str(error)))
            return None
        self.ids.add(query.id)
        if self.config.validation == SPLIT:
            own = side_of(query, self.config.validation_share, image_root(self.config))
            if own != side:
                self.left_out["images on both sides" if own is None else f"for {own}"] += 1
                return None
        reason = why_not(query.metadata.get(self.config.pass_rate)) if self.config.pass_rate else None
        if reason and side == "train":
            self.left_out[reason] += 1
            return None
        return query

    def _content_id(self, query: Query) -> str:
        """Rows come in another order in every epoch, so their numbers cannot name them."""
        names = [image_name(image, image_root(self.config)) for image in query.images]
        content = repr((query.question, query.answer, names)).encode("utf-8", "surrogatepass")
        return hashlib.blake2b(content, digest_size=8).hexdigest()


class Windows:
    """The endless order of one data set's queries, a window of them in memory.

    Args:
        config: of the data set.
        seed: of the order.
        prefix: of the ids.
    """

    def __init__(self, config: DataConfig, seed: int, prefix: str = "") -> None:
        self.config, self.seed, self.prefix = config, seed, prefix
        table = _open(config)
        self.reader, self.columns = _Reader(config, table), sorted(table.columns)
        self._shuffled = table.shuffled(seed)
        self._rows: Iterator[dict[str, Any] | ConfigError] | None = None
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
            self._rows = self._shuffled.start(start["epoch"], start["place"])
        share, window = self.config.max_bad_rows, self.config.shuffle_buffer
        faults = Faults(share, 0)
        faults.reasons, faults.first = Counter(start["bad"]), start["first"] and ConfigError(start["first"])
        rows, queries = start["rows"], []
        self.reader.new_window()
        for row in self._rows:
            rows += 1
            faults.rows(max(rows, window))  # a share of what is known of the data set
            query = self.reader.query(rows, row, faults, side="train")
            if query is not None:
                queries.append(replace(query, id=self.prefix + query.id))
                if len(queries) == window:
                    break
        ended = len(queries) < window
        if ended:
            faults.rows(rows)
            faults.check()
        questions = start["questions"] + len(queries)
        self._tell(start, faults, rows, ended)
        if ended and not questions:
            raise faults.first or ConfigError(f"{self.reader.where}: {self._nothing(rows)}")
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
            "place": self._shuffled.place(),
            "rows": rows,
            "questions": questions,
            "bad": dict(faults.reasons),
            "first": faults.first and str(faults.first),
        }

    def _tell(self, start: dict[str, Any], faults: Faults, rows: int, ended: bool) -> None:
        """Once per data set what its first window left out, and at the end of the first epoch what all of it did."""
        if start["epoch"] > 0 or os.environ.get("RANK", "0") != "0":
            return
        if self.reader.left_out and start["window"] == 0:
            counts = ", ".join(f"{reason} {n}" for reason, n in self.reader.left_out.most_common())
            log.info("%s: of the first %d rows not trained on: %s", self.reader.where, rows, counts)
        if faults.reasons and (ended or not start["bad"]):
            log.warning("%s: of the first %d rows %s", self.reader.where, rows, faults)

    def _nothing(self, rows: int) -> str:
        reasons = ", ".join(f"{reason} {n}" for reason, n in self.reader.left_out.most_common())
        return f"none of its {rows} rows is trained on ({reasons or 'the data set is empty'})"

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
