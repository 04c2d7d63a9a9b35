"""Rows of a data set, wherever it lies: a .parquet or .jsonl file, a folder, or a Hugging Face data set name."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rethinker.config import ConfigError

if TYPE_CHECKING:
    import datasets
    import pyarrow.parquet as parquet

# Of a .jsonl file, in bytes; a row with its images in base64 is far below.
LONGEST_LINE = 256 * 2**20

# Of a .parquet file's rows, at once.
BATCH_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Table:
    """A data set as read: its columns, its number of rows, its rows, and the folder its images lie in.

    A row is a dict, or the error of one that cannot be read while others can.
    """

    columns: list[str]
    size: int
    rows_or_errors: Iterator[dict[str, Any] | ConfigError]
    folder: Path | None
    identity: str = ""
    """Names this version of the data."""

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


def open_table(name: str, split: str, setting: str) -> Table:
    """Open a data set by file, folder or name. Nothing in it is run: no script, no pickle.

    Args:
        name: a .parquet or .jsonl file, a folder, or a Hugging Face data set's name (`name:subset` picks a subset).
        split: of a Hugging Face data set; a file has none.
        setting: the setting that `name` comes from, for messages.

    Raises:
        ConfigError: there is no such data set or split, or it cannot be read.
    """
    path = Path(os.path.expanduser(name))
    if path.suffix in (".parquet", ".jsonl"):
        if not os.path.isfile(path):
            raise ConfigError(f"{setting}={name}: no such file{nearby(path)}")
        read = _parquet if path.suffix == ".parquet" else _jsonl
        try:
            return read(path, setting)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(f"{setting}={name}: not a readable {path.suffix} file ({one_line(error)})") from error
    if os.path.isfile(path):
        raise ConfigError(f"{setting}={name}: files are read as .parquet or .jsonl; convert it, or give the folder")
    return _hugging_face(name, path, split, setting)


def _parquet(path: Path, setting: str) -> Table:
    import pyarrow

    file, where = open_parquet(path), f"{setting}={path}"

    def rows() -> Iterator[dict[str, Any] | ConfigError]:
        number = 0
        for group in range(file.metadata.num_row_groups):
            yield from parquet_rows(file, group, where, number)
            number += file.metadata.row_group(group).num_rows
        pyarrow.default_memory_pool().release_unused()  # up to gigabytes that the allocator would keep

    status = path.stat()
    identity = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
    return Table(list(file.schema_arrow.names), file.metadata.num_rows, rows(), path.parent, identity)


def open_parquet(path: Path) -> parquet.ParquetFile:
    """The file, to be read in pieces: a column of images may be one chunk of gigabytes."""
    import pyarrow.parquet as parquet

    return parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20)


def parquet_rows(
    file: parquet.ParquetFile, group: int, where: str, number: int = 0
) -> Iterator[dict[str, Any] | ConfigError]:
    """The rows of one row group, or the errors of those that cannot be read; the first row is called `number`."""
    size = file.metadata.row_group(group)
    batch_size = max(1, min(1024, BATCH_BYTES * size.num_rows // max(1, size.total_byte_size)))
    columns = list(file.schema_arrow.names)
    for batch in stopping(file.iter_batches(batch_size=batch_size, row_groups=[group]), where):
        try:
            yield from batch.to_pylist()
        except Exception:  # one value that is not what its column says, such as a text that is no UTF-8
            yield from (_row(batch, i, columns, f"{where}: row {number + i}") for i in range(batch.num_rows))
        number += batch.num_rows


def _row(batch: Any, i: int, columns: list[str], where: str) -> dict[str, Any] | ConfigError:
    try:
        return {name: column[i].as_py() for name, column in zip(columns, batch.columns, strict=True)}
    except Exception as error:
        return ConfigError(f"{where} cannot be read ({one_line(error)})")


def stopping(rows: Any, where: str) -> Iterator[Any]:
    """What a library reads; whatever it raises on damaged bytes becomes one line."""
    try:
        yield from rows
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{where}: damaged data ({one_line(error)})") from error


def _jsonl(path: Path, setting: str) -> Table:
    rows: list[dict[str, Any] | ConfigError] = []
    columns: dict[str, None] = {}
    where, damaged = f"{setting}={path}", 0
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), start=1):
            if not line.strip():
                continue
            if len(line) == LONGEST_LINE:
                raise ConfigError(f"{where}: line {number} is longer than {LONGEST_LINE >> 20} MiB")
            row = json_object(line, where, number)
            rows.append(row)
            if isinstance(row, dict):
                columns.update(dict.fromkeys(row))
                continue
            damaged += 1
            if damaged > 1000 and 2 * damaged > len(rows):  # no .jsonl at all: do not collect millions of errors
                break
    if damaged and 2 * damaged > len(rows):
        raise next(row for row in rows if isinstance(row, ConfigError))
    return Table(list(columns), len(rows), iter(rows), path.parent)


def json_object(line: bytes, where: str, number: int | str) -> dict[str, Any] | ConfigError:
    try:
        row = json.loads(line.decode("utf-8"))
    except json.JSONDecodeError as error:
        return ConfigError(f"{where}: line {number} is not JSON ({error.msg})")
    except (ValueError, RecursionError) as error:  # no UTF-8, a number of 5,000 digits, a thousand brackets
        return ConfigError(f"{where}: not a readable .jsonl file (line {number}: {one_line(error)})")
    if not isinstance(row, dict):
        return ConfigError(f"{where}: line {number} is not a JSON object with a column per key")
    return row


def _hugging_face(name: str, path: Path, split: str, setting: str) -> Table:
    loaded = load_hugging_face(name, path, split, setting, streaming=False)
    rows = stopping(loaded, f"{setting}={name}")
    folder = path if os.path.isdir(path) else None
    return Table(list(loaded.column_names), len(loaded), rows, folder, loaded._fingerprint)


def load_hugging_face(
    name: str, path: Path, split: str, setting: str, streaming: bool
) -> datasets.Dataset | datasets.IterableDataset:
    """A split as the library gives it, images still encoded. What `save_to_disk` wrote is no stream, but mapped.

    Raises:
        ConfigError: as `open_table`.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(f"{setting}={name} needs the package datasets: pip install datasets") from error

    local = os.path.isdir(path)
    source, _, subset = (name, "", "") if local else name.partition(":")
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        if local and any((path / marker).exists() for marker in ("dataset_dict.json", "state.json")):
            loaded = datasets.load_from_disk(str(path))
        else:
            with contextlib.nullcontext() if local or hub_answers(source) else _only_the_cache():
                loaded = datasets.load_dataset(str(path) if local else source, subset or None, streaming=streaming)
    except Exception as error:  # the library raises anything from FileNotFoundError to its own and the hub's errors
        hint = difflib.get_close_matches(name, ["easy_vqa", "digits"], cutoff=0.7)
        fix = (
            f"did you mean {hint[0]}?"
            if hint
            else "give easy_vqa, digits, a .parquet or .jsonl file, a folder, or a data set name"
        )
        raise ConfigError(f"{setting}={name}: cannot load it ({one_line(error)}); {fix}") from error
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
    return loaded


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


def nearby(path: Path) -> str:
    if not os.path.isdir(path.parent):
        return f" (there is no folder {path.parent})"
    try:
        close = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    except OSError:  # a folder that may not be listed
        return ""
    return f"; did you mean {path.with_name(close[0])}?" if close else ""


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
