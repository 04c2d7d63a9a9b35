"""Queries from any data set, checked when they are loaded.

What is wrong with the data is said before a model is loaded: the setting, the row, and what would work.
"""

from __future__ import annotations

import difflib
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from rethinker.config import ConfigError, DataConfig
from rethinker.data.archives import has_member, split_archive
from rethinker.data.faults import Faults
from rethinker.data.image_cache import EmbeddedImages, InRows
from rethinker.data.mixture import SOURCES, source_configs
from rethinker.data.sources import open_table
from rethinker.data.subsets import one_side, sometimes_right
from rethinker.embedded.digits import digits
from rethinker.embedded.easy_vqa import easy_vqa
from rethinker.samples import Query

log = logging.getLogger(__name__)

IMAGE_MARK = "<image>"

# As data.validation: a part of data.train.
SPLIT = "split"

# Metadata is printed, pickled and written as JSON, each by recursion.
DEEPEST_METADATA = 32

# Data sets that need no file: they come with an installed package.
BUILT_IN = {"easy_vqa": easy_vqa, "digits": digits}


def load_queries(config: DataConfig, which: Literal["train", "validation"], most: int | None = None) -> list[Query]:
    """Load and check the questions that `data.train` or `data.validation` names.

    `data.train: sources` loads all of `data.sources`; with `data.validation: split` both are parts of `data.train`, and
    `data.pass_rate` then leaves some out of training. Of a data set with `data.streaming` the first `most` held-out
    questions are taken, so that no more of it is read.

    Raises:
        ConfigError: as `load_table`; and sources, a split or pass rates that leave nothing or cannot be meant.
    """
    split = config.validation == SPLIT
    if which == "validation" and not split:
        return load_table(config, "validation")
    if (config.train == SOURCES) != bool(config.sources):
        raise ConfigError(f"data.sources goes with data.train=sources, and data.train is {config.train}; set both")
    if config.train == SOURCES:
        queries = []
        for source, own in source_configs(config).items():
            try:
                queries += [replace(query, id=f"{source}/{query.id}") for query in load_queries(own, which, most)]
            except ConfigError as error:
                raise type(error)(f"data.sources.{source}: {error}") from error
        return queries
    if split and which == "validation" and config.streaming:
        from rethinker.data.windows import held_out

        return held_out(config, most)
    queries, where = load_table(config, "train"), f"data.train={config.train}"
    if split:
        queries = one_side(queries, which, config.validation_share, image_root(config), where)
    if config.pass_rate is not None and which == "train":
        queries = sometimes_right(queries, config.pass_rate, where)
    return queries


def image_root(config: DataConfig) -> str | None:
    """Where the image paths of `data.train` start, if that is a place of the user's."""
    if config.image_root is not None or config.train in BUILT_IN:
        return config.image_root
    path = Path(os.path.expanduser(config.train))
    return str(path.parent if path.suffix in (".parquet", ".jsonl") else path)


def load_table(config: DataConfig, which: Literal["train", "validation"]) -> list[Query]:
    """All questions of the data set that `data.train` or `data.validation` names.

    Columns that `data.fields` does not name become metadata under their own names; a further entry of `data.fields`
    (`choices: options`) renames one. Without an id column, ids are the row numbers.

    A row without question or answer, an id that occurs again, an image that is not there, `<image>` marks that do not
    match the images, text that is no Unicode: such rows are left out, and one warning counts them and names the first.

    Raises:
        ConfigError: unknown or unreadable data set, missing column, no rows, or more than `data.max_bad_rows` bad ones.
    """
    name, setting = (config.train, "data.train") if which == "train" else (config.validation, "data.validation")
    if name is None:
        raise ConfigError(f"{setting} is null; name a data set")
    if name in BUILT_IN:
        return BUILT_IN[name]("train" if which == "train" else "test")
    table = open_table(name, config.train_split if which == "train" else config.validation_split, setting)
    if not table.size:
        raise ConfigError(f"{setting}={name}: the data set is empty")
    where = f"{setting}={name}"
    columns = find_columns(config, table.columns, where)
    rows = RowReader(where, columns, Path(config.image_root) if config.image_root else table.folder)
    faults = Faults(config.max_bad_rows, table.size)
    queries: dict[str, Query] = {}
    with EmbeddedImages(table.identity) as rows.embedded:
        for number, row in enumerate(table.rows_or_errors):
            if isinstance(row, ConfigError):
                faults.add("damaged row", row)
                continue
            try:
                query = rows.query(number, row)
                if query.id in queries:
                    raise repeated_id(query.id, columns)
            except BadRowError as error:
                faults.add(error.reason, ConfigError(str(error)))
                continue
            queries[query.id] = query
    if faults.reasons and os.environ.get("RANK", "0") == "0":  # every rank reads the same rows
        log.warning("%s: %s", where, faults)
    if not queries:
        raise faults.first
    return list(queries.values())


class BadRowError(ConfigError):
    """A row that is left out: the reason it is counted under, and what is wrong with it."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def repeated_id(name: str, columns: dict[str, str]) -> BadRowError:
    """The error of a row whose id another one has."""
    column = columns.get("id", "id")
    return BadRowError(
        "repeated id", f"data.fields.id={column}: the id {name!r} occurs more than once; ids must be unique"
    )


def find_columns(config: DataConfig, present: list[str], where: str) -> dict[str, str]:
    """Noun to column, for the columns that exist; a missing one is an error unless it is optional and not asked for."""
    defaults = DataConfig().fields
    fields = {**defaults, **config.fields}
    found = {}
    for noun, column in fields.items():
        if column in present:
            found[noun] = column
            continue
        close = difflib.get_close_matches(column, present, n=1, cutoff=0.5)
        optional = noun in ("images", "id") and column == defaults[noun]
        # A data set without images may be text-only, but `image` beside a wanted `images` is an oversight.
        if optional and not (noun == "images" and close):
            continue
        known = ", ".join(map(str, present[:40])) + (", ..." if len(present) > 40 else "")
        near = f"; the nearest is {close[0]}: set --data.fields.{noun} {close[0]}" if close else ""
        raise ConfigError(f"data.fields.{noun}={column}: {where} has no such column, but {known}{near}")
    return found


class RowReader:
    """Turns the rows of one table into queries."""

    def __init__(self, where: str, columns: dict[str, str], image_root: Path | None) -> None:
        self.where, self.columns, self.image_root = where, columns, image_root
        self.embedded: EmbeddedImages | InRows
        self._exists: dict[str, bool] = {}
        main = {columns.get(noun) for noun in ("question", "answer", "images", "id")}
        self._main, self._names = main, {column: noun for noun, column in columns.items() if column not in main}

    def query(self, number: int | str, row: dict[str, Any]) -> Query:
        """The row's query; without an id of its own it is called by its number.

        Raises:
            BadRowError: the row is to be left out.
        """
        given = self.columns.get("id")
        name = str(number if given is None or row.get(given) is None else row[given])
        shown = name if len(name) <= 80 else f"{name[:80]}..."
        question = row.get(self.columns["question"])
        if not isinstance(question, str):
            raise BadRowError(
                "no question", f"{self.where}: row {shown} has no question text in column {self.columns['question']!r}"
            )
        answer = row.get(self.columns["answer"])
        if not isinstance(answer, (str, int, float)) or (isinstance(answer, float) and not math.isfinite(answer)):
            raise BadRowError(
                "no answer",
                f"{self.where}: row {shown} has {_kind(answer)} as answer in column {self.columns['answer']!r}; "
                "an answer is a text or a number",
            )
        images = self._images(shown, row.get(self.columns["images"]) if "images" in self.columns else None)
        marks = question.count(IMAGE_MARK)
        if marks and marks != len(images):
            raise BadRowError(
                "image marks",
                f"{self.where}: row {shown} has {marks} {IMAGE_MARK} marks in its question but {len(images)} images; "
                "mark every image once, or none",
            )
        metadata = {self._names.get(column, column): value for column, value in row.items() if column not in self._main}
        query = Query(id=name, question=question, answer=str(answer), images=images, metadata=metadata)
        self._check_text(query, shown)
        return query

    def _check_text(self, query: Query, shown: str) -> None:
        """What the tokenizer and the files of the run cannot take: half a surrogate pair, as a careless cut leaves."""
        words = (value for value in query.metadata.values() if isinstance(value, str))
        for text in (query.id, query.question, query.answer, *words):
            if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
                raise BadRowError(
                    "no Unicode", f"{self.where}: row {shown!a} has a lone surrogate in {ascii(text)[:80]}"
                )
        for column, value in query.metadata.items():
            if isinstance(value, (list, dict)) and _deeper(value, DEEPEST_METADATA):
                raise BadRowError(
                    "nested too deep",
                    f"{self.where}: row {shown} has more than {DEEPEST_METADATA} levels in column {column!r}",
                )

    def _images(self, name: str, value: Any) -> tuple[Any, ...]:
        """References from a path, `{"bytes", "path"}`, raw bytes, a PIL image or a list of these; () for text-only."""
        if value is None or value == "" or (isinstance(value, (list, tuple)) and not value):
            return ()
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(self._image(name, item) for item in items)

    def _image(self, name: str, item: Any) -> Any:
        if isinstance(item, Mapping) and (item.get("bytes") or item.get("path")):
            item = item.get("bytes") if isinstance(item.get("bytes"), (bytes, bytearray)) else item.get("path")
        if isinstance(item, (bytes, bytearray)):
            return self.embedded.keep(bytes(item))
        if hasattr(item, "convert"):  # a PIL image
            return item
        if not isinstance(item, (str, Path)) or not str(item):
            raise BadRowError(
                "no image",
                f"{self.where}: row {name} has {_kind(item)} in the image column {self.columns['images']!r}; "
                "images are paths, bytes or a list of these",
            )
        path = Path(os.path.expanduser(item))
        if not path.is_absolute():
            if self.image_root is None:
                raise BadRowError(
                    "no image",
                    f"data.image_root is not set, but {self.where} holds relative image paths (row {name}: "
                    f"{str(item)[:200]}); set it to the folder that they start from",
                )
            path = self.image_root / path
        path = str(path)
        if path not in self._exists:
            self._exists[path] = os.path.isfile(path) or self._in_archive(path)  # through links; no pipe, no device
        if not self._exists[path]:
            hint = "data.image_root says where paths start"
            if "://" in path or str(item).startswith("data:"):
                hint = "images are files or bytes, nothing is downloaded"
            shown = path if len(path) <= 300 else f"{path[:300]}..."
            raise BadRowError("no image", f"{self.where}: row {name}: no image file {shown}; {hint}")
        return path

    def _in_archive(self, path: str) -> bool:
        archived = split_archive(path)
        try:
            return archived is not None and has_member(*archived)
        except ValueError as error:
            raise ConfigError(f"{self.where}: {error}") from error


def _deeper(value: Any, levels: int) -> bool:
    """Whether lists and mappings are nested deeper than this."""
    layer = [value]
    for _ in range(levels):
        layer = [
            item
            for container in layer
            for item in (container.values() if isinstance(container, dict) else container)
            if isinstance(item, (list, tuple, dict))
        ]
        if not layer:
            return False
    return True


def _kind(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return "nothing" if value is None else f"a {type(value).__name__}"
