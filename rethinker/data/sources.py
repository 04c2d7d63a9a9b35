"""Rows of a data set, wherever it lies: a .parquet or .jsonl file, a folder, or a Hugging Face data set name.

A data set is read whole and in its order, or as a stream that is never held. A stream has parts: a row group of a
.parquet file, 8 MiB of a .jsonl file, 1,000 rows of what `save_to_disk` wrote, a file of a data set on the hub. The
library (`datasets.IterableDataset`) shuffles the parts and knows the place: to go on from it reads one part again.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rethinker.config import ConfigError, one_line

if TYPE_CHECKING:
    import datasets
    import pyarrow.parquet as parquet

LONGEST_LINE = 256 * 2**20  # bytes of a .jsonl file's line; a row with its images in base64 is far below
BATCH_BYTES = 8 * 2**20  # of a .parquet file's rows that are read at once
SPAN = 8 * 2**20  # bytes of a .jsonl file that are a part of its stream
PART = 1000  # rows of a data set on disk that are a part of its stream
PEEKED = 1000  # rows that are looked at where no schema says what the columns are
_ERROR = "\0error"  # the column of a streamed row that cannot be read

# A row, or the error of one that cannot be read while others can.
Row = dict[str, Any] | ConfigError


@dataclass(frozen=True)
class Table:
    """A data set as it is read: its columns, its rows in their order, and the folder its images lie in."""

    where: str
    columns: list[str]
    rows_or_errors: Iterator[Row]
    folder: Path | None
    size: int | None = None
    """Number of rows; None of a stream, which does not know."""
    identity: str = ""
    """Names this version of the data."""
    stream: datasets.IterableDataset | None = None
    """What a stream is shuffled by; `readable` gives its rows."""

    @property
    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows, all of them readable.

        Raises:
            ConfigError: when it comes to one that is not.
        """
        for row in self.rows_or_errors:
            if isinstance(row, ConfigError):
                raise row
            yield row


def open_table(name: str, split: str, setting: str, streaming: bool = False) -> Table:
    """Open a data set by file, folder or name. Nothing in it is run: no script, no pickle.

    Args:
        name: a .parquet or .jsonl file, a folder, or a Hugging Face data set's name (`name:subset` picks a subset).
        split: of a Hugging Face data set; a file has none.
        setting: the setting that `name` comes from, for messages.
        streaming: open it as a stream.

    Raises:
        ConfigError: there is no such data set or split, it cannot be read, or it is empty.
    """
    path, where = Path(os.path.expanduser(name)), f"{setting}={name}"
    is_file = path.suffix in (".parquet", ".jsonl")
    if (streaming or not is_file) and find_spec("datasets") is None:
        raise ConfigError(f"{where} needs the package datasets: pip install datasets")
    if is_file:
        if not os.path.isfile(path):
            raise ConfigError(f"{where}: no such file{_nearby(path)}")
        try:
            kind = _parquet if path.suffix == ".parquet" else _jsonl
            table = kind(path, where, streaming)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(f"{where}: not a readable {path.suffix} file ({one_line(error)})") from error
    elif os.path.isfile(path):
        raise ConfigError(f"{where}: files are read as .parquet or .jsonl; convert it, or give the folder")
    else:
        table = _hugging_face(name, path, split, setting, streaming)
    if not table.size and not (streaming and table.columns):
        raise ConfigError(f"{where}: the data set is empty")
    return table


def readable(rows: Iterable[Any], where: str) -> Iterator[Row]:
    """Rows as a library gives them; whatever it raises on damaged bytes becomes one line.

    Raises:
        ConfigError: the data is damaged.
    """
    try:
        for row in rows:
            yield ConfigError(row[_ERROR]) if isinstance(row, dict) and _ERROR in row else row
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{where}: damaged data ({one_line(error)})") from error


def _parquet(path: Path, where: str, streaming: bool) -> Table:
    file = _open_parquet(path)
    groups, columns = list(range(file.metadata.num_row_groups)), list(file.schema_arrow.names)
    if streaming:
        return _streamed(path, where, _parquet_rows, groups, columns if groups else [])
    status = path.stat()
    identity = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
    return Table(where, columns, _parquet_rows(path, where, groups), path.parent, file.metadata.num_rows, identity)


def _open_parquet(path: Path) -> parquet.ParquetFile:
    """The file, to be read in pieces: a column of images may be one chunk of gigabytes."""
    import pyarrow.parquet as parquet

    return parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20)


def _parquet_rows(path: Path, where: str, groups: list[int]) -> Iterator[Row]:
    """The rows of row groups."""
    import pyarrow

    file = _open_parquet(path)
    for group in groups:
        number = sum(file.metadata.row_group(before).num_rows for before in range(group))
        size = file.metadata.row_group(group)
        batch_size = max(1, min(1024, BATCH_BYTES * size.num_rows // max(1, size.total_byte_size)))
        for batch in readable(file.iter_batches(batch_size=batch_size, row_groups=[group]), where):
            try:
                yield from batch.to_pylist()
            except Exception:  # one value that is not what its column says, such as a text that is no UTF-8
                yield from (_one_row(batch, i, f"{where}: row {number + i}") for i in range(batch.num_rows))
            number += batch.num_rows
    pyarrow.default_memory_pool().release_unused()  # up to gigabytes that the allocator would keep


def _one_row(batch: Any, i: int, where: str) -> Row:
    try:
        return {name: column[i].as_py() for name, column in zip(batch.schema.names, batch.columns, strict=True)}
    except Exception as error:
        return ConfigError(f"{where} cannot be read ({one_line(error)})")


def _jsonl(path: Path, where: str, streaming: bool) -> Table:
    size = path.stat().st_size
    if streaming:
        return _streamed(path, where, _jsonl_rows, [range(n, n + SPAN) for n in range(0, size, SPAN)])
    rows: list[Row] = []
    columns: dict[str, None] = {}
    damaged = 0
    for row in _jsonl_rows(path, where, [range(size)]):
        rows.append(row)
        if isinstance(row, dict):
            columns.update(dict.fromkeys(row))
            continue
        damaged += 1
        if damaged > 1000 and 2 * damaged > len(rows):  # no .jsonl at all: do not collect millions of errors
            break
    if damaged and 2 * damaged > len(rows):
        raise next(row for row in rows if isinstance(row, ConfigError))
    return Table(where, list(columns), iter(rows), path.parent, len(rows))


def _jsonl_rows(path: Path, where: str, spans: list[range]) -> Iterator[Row]:
    """The rows of the lines that begin in spans of bytes."""
    with open(path, "rb") as file:
        for span in spans:
            file.seek(max(0, span.start - 1))
            if span.start:
                file.readline(LONGEST_LINE)  # the rest of a line that belongs to the span before
            number = 0
            while (place := file.tell()) < span.stop and (line := file.readline(LONGEST_LINE)):
                number += 1
                called = f"line {number}" if span.start == 0 else f"the line at byte {place}"
                if len(line) == LONGEST_LINE:
                    raise ConfigError(f"{where}: {called} is longer than {LONGEST_LINE >> 20} MiB")
                if line.strip():
                    yield _json_row(line, where, called)


def _json_row(line: bytes, where: str, called: str) -> Row:
    try:
        row = json.loads(line.decode("utf-8"))
    except json.JSONDecodeError as error:
        return ConfigError(f"{where}: {called} is not JSON ({error.msg})")
    except (ValueError, RecursionError) as error:  # no UTF-8, a number of 5,000 digits, a thousand brackets
        return ConfigError(f"{where}: not a readable .jsonl file ({called}: {one_line(error)})")
    if not isinstance(row, dict):
        return ConfigError(f"{where}: {called} is not a JSON object with a column per key")
    return row


def _streamed(path: Path, where: str, read: Callable, parts: list[Any], columns: list[str] | None = None) -> Table:
    """A file as a stream of its parts."""
    import datasets
    from datasets.iterable_dataset import ExamplesIterable

    def examples(parts: list[Any]) -> Iterator[tuple[int, dict[str, Any]]]:
        for row in read(path, where, parts):
            yield 0, {_ERROR: str(row)} if isinstance(row, ConfigError) else row

    if not parts:
        return Table(where, [], iter(()), path.parent)
    datasets.utils.logging.set_verbosity_error()
    # As IterableDataset.from_generator, which would leave a lock file in the library's cache.
    stream = datasets.IterableDataset(ExamplesIterable(examples, {"parts": parts}))
    return _stream_table(stream, where, columns, path.parent)


def _stream_table(
    stream: datasets.IterableDataset, where: str, columns: list[str] | None, folder: Path | None
) -> Table:
    if columns is None:  # those of the first rows
        found: dict[str, None] = {}
        for number, row in enumerate(readable(stream, where), start=1):
            found |= {} if isinstance(row, ConfigError) else dict.fromkeys(row)
            if number == PEEKED:
                break
        columns = list(found)
    return Table(where, columns, readable(stream, where), folder, stream=stream)


def _hugging_face(name: str, path: Path, split: str, setting: str, streaming: bool) -> Table:
    """A split of the library's, images still encoded. What `save_to_disk` wrote is mapped, whole or as a stream."""
    import datasets

    local, where = os.path.isdir(path), f"{setting}={name}"
    folder = path if local else None
    source, _, subset = (str(path), "", "") if local else name.partition(":")
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        if local and any((path / marker).exists() for marker in ("dataset_dict.json", "state.json")):
            loaded = datasets.load_from_disk(source)
        else:
            with contextlib.nullcontext() if local or hub_answers(source) else _only_the_cache():
                loaded = datasets.load_dataset(source, subset or None, streaming=streaming)
    except Exception as error:  # the library raises anything from FileNotFoundError to its own and the hub's errors
        raise ConfigError(
            f"{where}: cannot load it ({one_line(error)}); give a .parquet or .jsonl file, a folder, or a data set name"
        ) from error
    finally:
        datasets.enable_progress_bars()
    if isinstance(loaded, dict):
        if split not in loaded:
            raise ConfigError(f"{setting}_split={split}: {name} has the splits {', '.join(loaded)}")
        loaded = loaded[split]
    for column, feature in (loaded.features or {}).items():  # images stay encoded until they are needed
        if isinstance(feature, datasets.Image):
            loaded = loaded.cast_column(column, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            loaded = loaded.cast_column(column, type(feature)(datasets.Image(decode=False)))
    if not streaming:
        rows = readable(loaded, where)
        return Table(where, list(loaded.column_names), rows, folder, len(loaded), loaded._fingerprint)
    if isinstance(loaded, datasets.Dataset):
        loaded = loaded.to_iterable_dataset(num_shards=max(1, len(loaded) // PART))
    elif local:
        loaded = loaded.reshard()  # by row groups; on the hub this would ask for every file
    return _stream_table(loaded, where, loaded.column_names, folder)


def hub_answers(name: str) -> bool:
    """Whether the hub can be asked for a data set; its client retries for half a minute before it says so itself."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().dataset_info(name, timeout=8)
    except HfHubHTTPError:  # it answers: no such data set, or no access
        return True
    except Exception:  # no network, or the hub is switched off
        return False
    return True


@contextlib.contextmanager
def _only_the_cache() -> Iterator[None]:
    import datasets

    before, datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _nearby(path: Path) -> str:
    if not os.path.isdir(path.parent):
        return f" (there is no folder {path.parent})"
    try:
        close = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    except OSError:  # a folder that may not be listed
        return ""
    return f"; did you mean {path.with_name(close[0])}?" if close else ""
