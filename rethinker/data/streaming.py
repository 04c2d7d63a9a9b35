"""Training questions in their order, all of them held or, with `data.streaming`, each read when it is drawn.

Both have the same order, of rows' places, and so the same state. A stream passes over rows that are not wanted, where
questions that are held leave them out first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import accumulate

from rethinker.config import ConfigError, DataConfig
from rethinker.data.datasets import Reader, load_queries
from rethinker.data.draw import open_draw
from rethinker.data.mixture import of_source, source_configs, source_weights, stream_weights
from rethinker.data.query_stream import QueryStream, fingerprint
from rethinker.data.sources import open_table
from rethinker.samples import Query

COMPARED = 64  # rows by which a resumed run tells other data


def open_stream(config: DataConfig, seed: int) -> tuple[QueryStream, int | None]:
    """The training questions in their order, and how many there are; None with `data.streaming`, which does not know.

    Raises:
        ConfigError: as `load_queries`; and settings that need all questions, with `data.streaming`.
    """
    if config.streaming:
        return StreamedQueries(config, seed), None
    queries = load_queries(config, "train")
    draw = open_draw(queries, config, seed)
    return QueryStream(queries, seed=seed, draw=draw, **stream_weights(queries, config)), len(queries)


class Unread(Sequence[Query | None]):
    """The rows of one or more data sets as queries, each read when it is asked for; None where it is left out.

    Args:
        readers: of the data sets, by the names that begin their queries' ids; "" for a single one.
    """

    def __init__(self, readers: dict[str, Reader]) -> None:
        self._readers = readers
        ends = accumulate(reader.table.size for reader in readers.values())
        self.members = {
            name: range(end - reader.table.size, end) for (name, reader), end in zip(readers.items(), ends, strict=True)
        }
        """The places of each data set."""
        self.places: dict[str, int] = {}
        """Of the queries read so far, by id."""

    def __len__(self) -> int:
        return sum(map(len, self.members.values()))

    def __getitem__(self, place: int) -> Query | None:
        name, own = next((name, own) for name, own in self.members.items() if place in own)
        query = self._readers[name].at(place - own.start)
        if query is None:
            return None
        query = replace(query, id=f"{name}/{query.id}") if name else query
        self.places[query.id] = place
        return query


class StreamedQueries(QueryStream):
    """The order of questions that are not held; with `data.train: sources` in the shares of their weights.

    Raises:
        ConfigError: data that cannot be used, or settings that need all of it.
    """

    def __init__(self, config: DataConfig, seed: int) -> None:
        readers: dict[str, Reader] = {}
        for name, own in (source_configs(config) or {"": config}).items():
            with of_source(name) if name else nullcontext():
                readers[name] = _reader(own)
        rows = Unread(readers)
        super().__init__(rows, seed=seed, category_weights=source_weights(config), members=rows.members)
        columns = {name: sorted(reader.table.columns) for name, reader in readers.items()}
        some = map(rows.__getitem__, range(0, len(rows), max(1, len(rows) // COMPARED)))
        content = json.dumps([columns, fingerprint(query for query in some if query)])
        self._fingerprint = hashlib.sha256(content.encode()).hexdigest()

    def fingerprint(self) -> str:
        """Of the columns and some of the rows."""
        return self._fingerprint

    def keep(self, queries: Iterable[Query]) -> dict[str, int]:
        """The places of the queries that held samples refer to."""
        return {query.id: self.queries.places[query.id] for query in queries}

    def kept(self, state: dict[str, int]) -> dict[str, Query]:
        """The queries by id, of what `keep` gave."""
        return {name: self.queries[place] for name, place in state.items()}


def _reader(config: DataConfig) -> Reader:
    """The reader of a data set that holds a wanted question."""
    if config.category_weights:
        raise ConfigError(
            f"data.category_weights={config.category_weights} needs all questions by category; with data.streaming "
            "set it to {}, and mix data sets with the weights of data.sources"
        )
    reader = Reader(config, open_table(config.train, config.train_split, "data.train", streaming=True), "train")
    if all(reader.at(number) is None for number in range(reader.table.size)):
        raise reader.nothing()
    return reader
