"""Rows of a data set, wherever it lies: a .parquet, .jsonl or .json file, a folder, or a Hugging Face data set name.

Rows are read by their place, a few at a time. With `data.streaming` the library `datasets` copies a .parquet file once,
uncompressed, to its cache and maps it from there, as it does folders and names. An array in a .json file is held whole.
"""

from __future__ import annotations

import codecs
import json
import mmap
import os
import shlex
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from rethinker.config import ConfigError, nearest, one_line

SUFFIXES = (".parquet", ".jsonl", ".json")
CHUNK = 64  # rows that are read at once; a row may hold megabytes of images
PEEKED = 1000  # rows of a stream that are looked at where no schema says what the columns are

# A row, or the error of one that cannot be read while others can.
Row = dict[str, Any] | ConfigError


@dataclass(frozen=True)
class Table:
    """A data set as it is read: its columns, how many rows it has, and the folder its images lie in."""

    where: str
    columns: list[str]
    size: int
    folder: Path | None
    read: Callable[[int, int], list[Row]]
    """The rows from one place up to another; raises what the library raises on damaged data."""

    def rows(self) -> Iterator[Row]:
        """All rows in their order."""
        for start in range(0, self.size, CHUNK):
            yield from self.between(start, min(start + CHUNK, self.size))

    def between(self, start: int, stop: int) -> list[Row]:
        """The rows of these places; raises ConfigError if the data is damaged."""
        try:
            return self.read(start, stop)
        except Exception as error:
            raise ConfigError(f"{self.where}: damaged data ({one_line(error)})") from error


def open_table(name: str, split: str, setting: str, streaming: bool = False) -> Table:
    """Open a data set by file, folder or name. Nothing in it is run: no script, no pickle.

    Args:
        name: a .parquet, .jsonl or .json file, a folder, or a Hugging Face data set's name (`name:subset` picks a
            subset).
        split: of a Hugging Face data set; a file has none.
        setting: the setting that `name` comes from, for messages.
        streaming: whether its rows are to stay on the disk.

    Raises:
        ConfigError: there is no such data set or split, it cannot be read, or it is empty.
    """
    path, where = Path(os.path.expanduser(name)), f"{setting}={name}"
    if path.suffix in SUFFIXES:
        if not os.path.isfile(path):
            close = nearest(path.name, (other.name for other in path.parent.glob("*")))
            raise ConfigError(f"{where}: no such file" + (f"; did you mean {path.with_name(close)}?" if close else ""))
        try:
            table = (_parquet if path.suffix == ".parquet" else _json)(path, where, streaming)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(f"{where}: not a readable {path.suffix} file ({one_line(error)})") from error
    elif os.path.isfile(path):
        raise ConfigError(f"{where}: files are read as .parquet, .jsonl or .json; convert it, or give the folder")
    else:
        table = _hugging_face(name, path, split, setting)
    if not table.size:
        raise ConfigError(f"{where}: the data set is empty")
    return table


def _parquet(path: Path, where: str, streaming: bool) -> Table:
    """A file row group by row group, or the library's copy of it. Arrow would keep the memory that this took."""
    import pyarrow as pa
    from pyarrow import default_memory_pool, parquet

    if streaming:
        try:
            copy = _library().Dataset.from_parquet(str(path)).with_format("arrow")
        except _library().exceptions.DatasetGenerationError as error:
            if not isinstance(error.__cause__, pa.ArrowNotImplementedError):  # a damaged file, say
                raise
            raise ConfigError(f"{where}: data.streaming takes row groups below 2 GiB; write smaller ones") from error
        default_memory_pool().release_unused()
        return _arrow(copy, where, path.parent)
    file = parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20)
    firsts = [0, *accumulate(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))]

    @lru_cache(1)
    def group(i: int) -> pa.Table:
        try:
            return file.read_row_group(i, use_threads=False)
        except pa.ArrowNotImplementedError:  # images of more than 2 GiB, which do not fit one array
            return pa.Table.from_batches(file.iter_batches(CHUNK, [i], use_threads=False))

    def read(start: int, stop: int) -> list[Row]:
        i = bisect_right(firsts, start) - 1
        rows = _listed(group(i).slice(start - firsts[i], stop - start), where, start)
        if stop == firsts[-1]:
            group.cache_clear()
            default_memory_pool().release_unused()
        return rows if start + len(rows) == stop else rows + read(start + len(rows), stop)

    return Table(where, file.schema_arrow.names, firsts[-1], path.parent, read)


def _arrow(table: Any, where: str, folder: Path | None) -> Table:
    """A data set of the library's that gives tables of Arrow's, in which images stay encoded."""

    def read(start: int, stop: int) -> list[Row]:
        return _listed(table[start:stop], where, start)

    return Table(where, table.column_names, len(table), folder, read)


def _listed(table: Any, where: str, first: int) -> list[Row]:
    """Rows of Arrow's as Python's; one value that is not what its column says costs its row alone.

    A 32-bit number is the one that its shortest text says, 3.7 and not 3.700000047683716; a ClassLabel is its name.
    """
    import pyarrow as pa

    try:
        for i, field in enumerate(table.schema):
            texts, doubles = (_with_floats(field.type, kind) for kind in (pa.string(), pa.float64()))
            if doubles != field.type:
                table = table.set_column(i, field.name, table[i].cast(texts).cast(doubles))
        rows = table.to_pylist()
    except Exception as error:  # such as a text that is no UTF-8
        if len(table) == 1:
            return [ConfigError(f"{where}: row {first} cannot be read ({one_line(error)})")]
        return [row for i in range(len(table)) for row in _listed(table[i : i + 1], where, first + i)]
    for column, names in _class_names((table.schema.metadata or {}).get(b"huggingface")).items():
        for row in rows:
            if isinstance(row.get(column), int) and 0 <= row[column] < len(names):
                row[column] = names[row[column]]
    return rows


def _with_floats(kind: Any, number: Any) -> Any:
    """The Arrow type with `number` in the place of every 32-bit float."""
    import pyarrow as pa

    if pa.types.is_float32(kind):
        return number
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_with_floats(field.type, number)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_with_floats(kind.value_type, number)))
    return kind


@lru_cache(4)
def _class_names(metadata: bytes | None) -> dict[str, list[str]]:
    """The names of each ClassLabel's values, as the library writes them into a file's schema."""
    try:
        features = json.loads(metadata or b"{}")["info"]["features"]
        return {name: kind["names"] for name, kind in features.items() if kind.get("_type") == "ClassLabel"}
    except (ValueError, KeyError, TypeError, AttributeError):  # another library's metadata
        return {}


def _json(path: Path, where: str, streaming: bool) -> Table:
    """A file of JSON: an object per line or, in a .json file, an array of objects."""
    places: list[tuple[int, int, int]] = []  # of a row: its line's number, its first byte, the byte behind its last
    if not path.stat().st_size:
        return Table(where, [], 0, path.parent, lambda start, stop: [])
    with open(path, "rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if b"\0" in content[:2] or content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            fix = f"iconv -f UTF-16 -t UTF-8 {shlex.quote(path.name)} > {shlex.quote(f'utf8{path.suffix}')}"
            raise ConfigError(f"{where}: the file is UTF-16, and JSON is read as UTF-8; convert it: {fix}")
        end = len(codecs.BOM_UTF8) if content[:3] == codecs.BOM_UTF8 else 0
        if path.suffix == ".json" and content[end : end + 1000].lstrip()[:1] == b"[":
            return _json_array(content[end:], where, path.parent)
        file.seek(end)
        for number, line in enumerate(file, start=1):
            start, end = end, end + len(line)
            if line.strip():
                places.append((number, start, end))

    def read(start: int, stop: int) -> list[Row]:
        return [_json_row(content[first:end], where, number) for number, first, end in places[start:stop]]

    table = Table(where, [], len(places), path.parent, read)
    rows = list(islice(table.rows(), PEEKED if streaming else None))
    return Table(where, _columns(rows), len(places), path.parent, read)


def _json_array(content: bytes, where: str, folder: Path) -> Table:
    rows = [
        row if isinstance(row, dict) else ConfigError(f"{where}: entry {number} of the array is not a JSON object")
        for number, row in enumerate(json.loads(content.decode("utf-8")))
    ]
    return Table(where, _columns(rows), len(rows), folder, lambda start, stop: rows[start:stop])


def _columns(rows: list[Row]) -> list[str]:
    """The columns that some row has; raises the error of the first row if no row can be read."""
    columns = list(dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row))
    if not columns and rows and isinstance(rows[0], ConfigError):
        raise rows[0]
    return columns


def _json_row(line: bytes, where: str, number: int) -> Row:
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, a number of 5,000 digits, a thousand brackets
        return ConfigError(f"{where}: line {number} is not JSON ({one_line(error)})")
    if not isinstance(row, dict):
        return ConfigError(f"{where}: line {number} is not a JSON object with a column per key")
    return row


def _hugging_face(name: str, path: Path, split: str, setting: str) -> Table:
    """A split of a data set of the library's, whose files it maps."""
    datasets = _library()
    local, where = os.path.isdir(path), f"{setting}={name}"
    source, _, subset = (str(path), "", "") if local else name.partition(":")
    try:
        if local and any((path / marker).exists() for marker in ("dataset_dict.json", "state.json")):
            loaded = datasets.load_from_disk(source)
        else:
            if not local:  # else the library's client would ask for half a minute
                datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE or not hub_answers(source)
            loaded = datasets.load_dataset(source, subset or None)
    except Exception as error:  # the library raises anything from FileNotFoundError to its own and the hub's errors
        raise ConfigError(
            f"{where}: cannot load it ({one_line(error)}); give a .parquet, .jsonl or .json file, a folder, or a data "
            "set name"
        ) from error
    if isinstance(loaded, dict):
        if split not in loaded:
            raise ConfigError(f"{setting}_split={split}: {name} has the splits {', '.join(loaded)}")
        loaded = loaded[split]
    return _arrow(loaded.with_format("arrow"), where, path if local else None)


def _library() -> Any:
    """The package `datasets`, silent."""
    import datasets

    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    return datasets


def hub_answers(name: str) -> bool:
    """Whether the hub can be asked for a data set; its client retries for half a minute before it says so itself."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        with suppress(HfHubHTTPError):  # it answers: no such data set, or no access
            HfApi().dataset_info(name, timeout=8)
    except Exception:  # no network, or the hub is switched off
        return False
    return True
