"""Rows of a data set read as they come: its parts in a seeded order of each epoch, from any row reached before.

A part is a row group of a .parquet file, 8 MiB of a .jsonl file, 1,000 rows of what `save_to_disk` wrote, a file of a
data set on the hub. The library (`datasets.IterableDataset`) shuffles the parts and knows the place: to go on from it
reads no more than the part again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rethinker.config import ConfigError
from rethinker.data.sources import (
    LONGEST_LINE,
    json_object,
    load_hugging_face,
    nearby,
    one_line,
    open_parquet,
    parquet_rows,
    stopping,
)

if TYPE_CHECKING:
    import datasets

SPAN = 8 * 2**20  # bytes of a .jsonl file
PART = 1000  # rows of a data set on disk
PEEKED = 1000  # rows that are looked at where no schema says what the columns are
_ERROR = "\0error"  # the column of a row that cannot be read


@dataclass(frozen=True)
class StreamedTable:
    """A data set that is never held: its columns, the folder its images lie in, and its rows."""

    columns: list[str]
    folder: Path | None
    where: str
    dataset: datasets.IterableDataset

    def in_order(self) -> Iterator[dict[str, Any] | ConfigError]:
        """All rows once, part by part."""
        return _unwrapped(self.dataset, self.where)

    def shuffled(self, seed: int) -> ShuffledRows:
        """The rows with their parts in a random order."""
        return ShuffledRows(self.dataset.shuffle(seed=seed, buffer_size=1, max_buffer_input_shards=1), self.where)


class ShuffledRows:
    """The rows of one epoch after another, each with the parts in its own order."""

    def __init__(self, dataset: datasets.IterableDataset, where: str) -> None:
        self._dataset, self._where = dataset, where

    def start(self, epoch: int, place: dict[str, Any] | None) -> Iterator[dict[str, Any] | ConfigError]:
        """The rows of an epoch from a `place` on; None is its beginning. A running iterator ends with the next call."""
        self._dataset.set_epoch(epoch)
        self._dataset.load_state_dict(place)
        return _unwrapped(self._dataset, self._where)

    def place(self) -> dict[str, Any]:
        """After the row that came last; plain values."""
        return self._dataset.state_dict()


def open_stream_of_rows(name: str, split: str, setting: str) -> StreamedTable:
    """Open a data set without reading it; arguments and errors are those of `sources.open_table`."""
    import datasets
    from datasets.iterable_dataset import ExamplesIterable

    path, where = Path(os.path.expanduser(name)), f"{setting}={name}"
    datasets.utils.logging.set_verbosity_error()
    if path.suffix in (".parquet", ".jsonl"):
        if not os.path.isfile(path):
            raise ConfigError(f"{where}: no such file{nearby(path)}")
        try:
            if path.suffix == ".parquet":
                file = open_parquet(path)
                parts = {"groups": list(range(file.metadata.num_row_groups))}
                columns, rows = list(file.schema_arrow.names), _parquet
            else:
                parts, columns, rows = {"starts": list(range(0, path.stat().st_size, SPAN))}, None, _lines
            if not next(iter(parts.values())):
                raise ConfigError(f"{where}: the data set is empty")
            # As IterableDataset.from_generator, which would leave a lock file in the library's cache.
            arguments = {"path": str(path), "where": where} | parts
            dataset = datasets.IterableDataset(ExamplesIterable(rows, arguments))
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(f"{where}: not a readable {path.suffix} file ({one_line(error)})") from error
        folder = path.parent
    elif os.path.isfile(path):
        raise ConfigError(f"{where}: files are read as .parquet or .jsonl; convert it, or give the folder")
    else:
        dataset = load_hugging_face(name, path, split, setting, streaming=True)
        folder = path if os.path.isdir(path) else None
        if isinstance(dataset, datasets.Dataset):
            dataset = dataset.to_iterable_dataset(num_shards=max(1, len(dataset) // PART))
        elif folder is not None:
            dataset = dataset.reshard()  # by row groups; on the hub this would ask for every file
        columns = dataset.column_names
    return StreamedTable(columns or _peeked(dataset, where), folder, where, dataset)


def _peeked(dataset: datasets.IterableDataset, where: str) -> list[str]:
    """The columns of the first rows."""
    columns: dict[str, None] = {}
    for number, row in enumerate(_unwrapped(dataset, where)):
        if isinstance(row, dict):
            columns |= dict.fromkeys(row)
        if number + 1 == PEEKED:
            break
    return list(columns)


def _parquet(path: str, where: str, groups: list[int]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The rows of the row groups, each with a key that nobody reads."""
    file = open_parquet(Path(path))
    for group in groups:
        for row in parquet_rows(file, group, f"{where}: row group {group}"):
            yield group, {_ERROR: str(row)} if isinstance(row, ConfigError) else row


def _lines(path: str, where: str, starts: list[int]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The rows of the lines that begin in the spans from `starts` on, likewise."""
    with open(path, "rb") as file:
        for start in starts:
            file.seek(max(0, start - 1))
            if start:
                file.readline(LONGEST_LINE)  # the rest of a line that belongs to the span before
            while (place := file.tell()) < start + SPAN and (line := file.readline(LONGEST_LINE)):
                if len(line) == LONGEST_LINE:
                    raise ConfigError(f"{where}: the line at byte {place} is longer than {LONGEST_LINE >> 20} MiB")
                if line.strip():
                    row = json_object(line, where, f"at byte {place}")
                    yield place, {_ERROR: str(row)} if isinstance(row, ConfigError) else row


def _unwrapped(rows: Any, where: str) -> Iterator[dict[str, Any] | ConfigError]:
    for row in stopping(rows, where):
        yield ConfigError(row[_ERROR]) if _ERROR in row else row
