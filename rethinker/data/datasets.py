"""Queries from any data set, checked when they are read.

What is wrong with the data is said before a model is loaded: the setting, the row, and what would work.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from rethinker.config import ConfigError, DataConfig
from rethinker.data.archives import has_member, split_archive
from rethinker.data.faults import check_bad_rows, counts
from rethinker.data.image_cache import EmbeddedImages, in_its_row
from rethinker.data.mixture import of_source, source_configs
from rethinker.data.sources import Row, Table, open_table
from rethinker.data.subsets import Side, image_name, side_of, why_not
from rethinker.samples import Query

log = logging.getLogger(__name__)

IMAGE_MARK = "<image>"

# As data.validation: a part of data.train.
SPLIT = "split"

# Metadata is printed, pickled and written as JSON, each by recursion.
DEEPEST_METADATA = 32


def load_queries(config: DataConfig, which: Side, most: int | None = None) -> list[Query]:
    """All questions that `data.train` or `data.validation` names; of `data.train: sources` those of all sources.

    Columns that `data.fields` does not name become metadata under their own names; a further entry of `data.fields`
    (`choices: options`) renames one. Without an id column, ids are the row numbers.

    A row without question or answer, an id that occurs again, an image that is not there, `<image>` marks that do not
    match the images, text that is no Unicode: such rows are left out, and one warning counts them and names the first.
    With `data.validation: split` both sides are parts of `data.train`, and `data.pass_rate` leaves some out of
    training. With `data.streaming` the first `most` held-out questions of a split are taken, and no more is read.

    Raises:
        ConfigError: unknown or unreadable data set, missing column, no rows, or more than `data.max_bad_rows` bad ones;
            a split or pass rates that leave nothing.
    """
    if which == "validation" and config.validation != SPLIT:
        name, split, setting = config.validation, config.validation_split, "data.validation"
        if name is None:
            raise ConfigError(f"{setting} is null; name a data set")
    else:
        queries = []
        for source, own in source_configs(config).items():
            with of_source(source):
                queries += [replace(query, id=f"{source}/{query.id}") for query in load_queries(own, which, most)]
        if queries:
            return queries
        name, split, setting = config.train, config.train_split, "data.train"
    streaming = config.streaming and which == "validation" and setting == "data.train"
    table = open_table(name, split, setting, streaming)
    with contextlib.nullcontext() if streaming else EmbeddedImages(table.identity) as images:
        reader = Reader(config, table, which, images.keep if images else in_its_row)
        queries = list(islice(reader.queries(table.rows_or_errors), most if streaming else None))
    reader.report()
    if not queries:
        raise reader.nothing()
    return queries


def image_root(config: DataConfig) -> str | None:
    """Where the image paths of `data.train` start; None if `data.image_root` is "": nowhere in particular."""
    if config.image_root is not None:
        return config.image_root or None
    path = Path(os.path.expanduser(config.train))
    return str(path.parent if path.suffix in (".parquet", ".jsonl") else path)


class BadRowError(ConfigError):
    """A row that is left out: the reason it is counted under, and what is wrong with it."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def repeated_id(name: str, columns: dict[str, str]) -> BadRowError:
    """The error of a row whose id another one has."""
    return BadRowError(
        "repeated id", f"data.fields.id={columns['id']}: the id {name!r} occurs more than once; ids must be unique"
    )


def find_columns(config: DataConfig, present: list[str], where: str) -> dict[str, str]:
    """Noun to column; a missing one is an error unless it is optional and not asked for."""
    defaults = DataConfig().fields
    fields = {**defaults, **config.fields}
    for noun, column in fields.items():
        if column in present:
            continue
        close = difflib.get_close_matches(column, present, n=1, cutoff=0.5)
        optional = noun in ("images", "id") and column == defaults[noun]
        # A data set without images may be text-only, but `image` beside a wanted `images` is an oversight.
        if optional and not (noun == "images" and close):
            continue
        known = ", ".join(map(str, present[:40])) + (", ..." if len(present) > 40 else "")
        near = f"; the nearest is {close[0]}: set --data.fields.{noun} {close[0]}" if close else ""
        raise ConfigError(f"data.fields.{noun}={column}: {where} has no such column, but {known}{near}")
    return fields


class Reader:
    """Turns the rows of a data set into the queries that are wanted of it, and counts all others.

    Args:
        config: of the data set.
        table: the data set.
        which: what the queries are for.
        keep: takes an image that a row holds as bytes, and returns a reference.

    Raises:
        ConfigError: a column that is not there.
    """

    def __init__(self, config: DataConfig, table: Table, which: Side, keep: Callable[[bytes], Any]) -> None:
        self.config, self.table, self.which, self.keep, self.where = config, table, which, keep, table.where
        self.columns = find_columns(config, table.columns, self.where)
        self.root = Path(config.image_root) if config.image_root else table.folder
        self._main = {self.columns[noun] for noun in ("question", "answer", "images", "id")}
        self._nouns = {column: noun for noun, column in self.columns.items() if column not in self._main}
        self._rate = config.pass_rate if which == "train" else None
        others = [str(self._nouns.get(column, column)) for column in table.columns if column not in self._main]
        if self._rate is not None and self._rate not in others:
            known = ", ".join(others) or "none besides question, answer, images and id"
            raise ConfigError(f"data.pass_rate={self._rate}: {self.where} has no such column, but {known}")
        self.left_out: Counter[str] = Counter()
        self.restart()

    def restart(self, rows: int = 0, bad: Mapping[str, int] | None = None, first: str | None = None) -> None:
        """Go on after so many rows, of which some were bad; the ids and the files seen so far are forgotten."""
        self.rows, self.bad, self.first_bad = rows, Counter(bad), first and ConfigError(first)
        self._ids: set[str] = set()
        self._exists: dict[str, bool] = {}

    def queries(self, rows: Iterable[Row]) -> Iterator[Query]:
        """The wanted queries of the rows, in their order.

        Raises:
            ConfigError: one bad row too many.
        """
        for row in rows:
            self.rows += 1
            try:
                query = self._query(row)
            except BadRowError as error:
                self.bad[error.reason] += 1
                self.first_bad = self.first_bad or ConfigError(str(error))
                self.check_bad(self.table.size or max(self.rows, self.config.shuffle_buffer))
                continue
            if reason := self._unwanted(query):
                self.left_out[reason] += 1
            else:
                yield query

    def check_bad(self, rows: int) -> None:
        """Raise ConfigError if more than `data.max_bad_rows` of so many rows were bad."""
        if self.first_bad:
            check_bad_rows(self.first_bad, self.bad.total(), rows, self.config.max_bad_rows)

    def report(self) -> None:
        """Log how many rows were left out, and why; on rank 0, since every rank reads the same rows."""
        if os.environ.get("RANK", "0") != "0":
            return
        if self.left_out:
            log.info("%s: of %d rows not used for %s: %s", self.where, self.rows, self.which, counts(self.left_out))
        if self.bad:
            total, reasons = self.bad.total(), counts(self.bad)
            log.warning(
                "%s: of %d rows left out %d unusable ones (%s); the first: %s",
                *(self.where, self.rows, total, reasons, self.first_bad),
            )

    def nothing(self) -> ConfigError:
        """The error of a data set of which no query is left."""
        if not self.left_out:
            return self.first_bad or ConfigError(f"{self.where}: the data set is empty")
        settings = [f"data.validation_share={self.config.validation_share:g}"] * (self.config.validation == SPLIT)
        settings += [f"data.pass_rate={self._rate}"] * (self._rate is not None)
        return ConfigError(
            f"{self.where}: none of its {self.rows} rows is left for {self.which} ({counts(self.left_out)}); change "
            + " or ".join(settings)
        )

    def _unwanted(self, query: Query) -> str | None:
        """Why a query is not one of those wanted here."""
        if self.config.validation == SPLIT:
            side = side_of(query, self.config.validation_share, image_root(self.config))
            if side != self.which:
                return "images on both sides" if side is None else f"for {side}"
        return why_not(query.metadata.get(self._rate)) if self._rate is not None else None

    def _query(self, row: Row) -> Query:
        """The row's query.

        Raises:
            BadRowError: the row is to be left out.
        """
        if isinstance(row, ConfigError):
            raise BadRowError("damaged row", str(row))
        given = row.get(self.columns["id"])
        streaming = self.table.size is None
        number = f"{self.rows} (as read)" if streaming else f"{self.rows - 1}"
        name = number if given is None else str(given)
        called = f"{self.where}: row {name if len(name) <= 80 else f'{name[:80]}...'}"
        question, answer = row.get(self.columns["question"]), row.get(self.columns["answer"])
        if not isinstance(question, str):
            raise BadRowError("no question", f"{called} has no question text in column {self.columns['question']!r}")
        if not isinstance(answer, (str, int, float)) or (isinstance(answer, float) and not math.isfinite(answer)):
            raise BadRowError(
                "no answer",
                f"{called} has {_kind(answer)} as answer in column {self.columns['answer']!r}; "
                "an answer is a text or a number",
            )
        images = row.get(self.columns["images"])
        images = images if isinstance(images, (list, tuple)) else [] if images in (None, "") else [images]
        images = tuple(self._image(called, item) for item in images)
        marks = question.count(IMAGE_MARK)
        if marks and marks != len(images):
            raise BadRowError(
                "image marks",
                f"{called} has {marks} {IMAGE_MARK} marks in its question but {len(images)} images; "
                "mark every image once, or none",
            )
        metadata = {self._nouns.get(column, column): value for column, value in row.items() if column not in self._main}
        query = Query(name, question, str(answer), images, metadata)
        _check_text(query, called)
        if given is None and streaming:  # rows come in another order in every epoch: their numbers cannot name them
            return replace(query, id=self._content_id(query))
        if name in self._ids:
            raise repeated_id(name, self.columns)
        self._ids.add(name)
        return query

    def _content_id(self, query: Query) -> str:
        names = [image_name(image, image_root(self.config)) for image in query.images]
        content = repr((query.question, query.answer, names)).encode("utf-8", "surrogatepass")
        return hashlib.blake2b(content, digest_size=8).hexdigest()

    def _image(self, called: str, item: Any) -> Any:
        """A reference from a path, `{"bytes", "path"}` or raw bytes."""
        if isinstance(item, Mapping) and (item.get("bytes") or item.get("path")):
            item = item.get("bytes") if isinstance(item.get("bytes"), (bytes, bytearray)) else item.get("path")
        if isinstance(item, (bytes, bytearray)):
            return self.keep(bytes(item))
        if not isinstance(item, (str, Path)) or not str(item):
            raise BadRowError(
                "no image",
                f"{called} has {_kind(item)} in the image column {self.columns['images']!r}; "
                "images are paths, bytes or a list of these",
            )
        path = Path(os.path.expanduser(item))
        if not path.is_absolute():
            if self.root is None:
                raise BadRowError(
                    "no image",
                    f"data.image_root is not set, but the data holds relative image paths ({called}: "
                    f"{str(item)[:200]}); set it to the folder that they start from",
                )
            path = self.root / path
        path = str(path)
        if path not in self._exists:
            self._exists[path] = os.path.isfile(path) or self._in_archive(path)  # through links; no pipe, no device
        if not self._exists[path]:
            hint = "data.image_root says where paths start"
            if "://" in path or str(item).startswith("data:"):
                hint = "images are files or bytes, nothing is downloaded"
            shown = path if len(path) <= 300 else f"{path[:300]}..."
            raise BadRowError("no image", f"{called}: no image file {shown}; {hint}")
        return path

    def _in_archive(self, path: str) -> bool:
        archived = split_archive(path)
        try:
            return archived is not None and has_member(*archived)
        except ValueError as error:
            raise ConfigError(f"{self.where}: {error}") from error


def _check_text(query: Query, called: str) -> None:
    """What the tokenizer and the files of the run cannot take: half a surrogate pair, as a careless cut leaves."""
    words = (value for value in query.metadata.values() if isinstance(value, str))
    for text in (query.id, query.question, query.answer, *words):
        if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
            raise BadRowError("no Unicode", f"{ascii(called)[1:-1]} has a lone surrogate in {ascii(text)[:80]}")
    for column, value in query.metadata.items():
        if _deeper(value, DEEPEST_METADATA):
            raise BadRowError(
                "nested too deep", f"{called} has more than {DEEPEST_METADATA} levels in column {column!r}"
            )


def _deeper(value: Any, levels: int) -> bool:
    """Whether lists and mappings are nested deeper than this."""
    if not isinstance(value, (list, tuple, dict)):
        return False
    inside = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_deeper(item, levels - 1) for item in inside)


def _kind(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return "nothing" if value is None else f"a {type(value).__name__}"
