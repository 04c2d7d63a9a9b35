"""Queries from any data set, checked when they are read.

What is wrong with the data is said before a model is loaded: the setting, the row, and what would work.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from rethinker.config import ConfigError, DataConfig, nearest
from rethinker.data.archives import in_archive
from rethinker.data.formats import (
    FORMATS,
    BadValueError,
    answer_of,
    cell,
    check_shown,
    dressed,
    format_columns,
    format_of,
    image_in,
    image_text,
    kind_of,
    question_of,
    with_choices,
)
from rethinker.data.mixture import of_source, source_configs
from rethinker.data.sources import PEEKED, SUFFIXES, Row, Table, open_table
from rethinker.data.subsets import Side, content_name, side_of, why_not
from rethinker.samples import IMAGE_MARK, Query

log = logging.getLogger(__name__)

# As data.validation: a part of data.train.
SPLIT = "split"

# Bytes of embedded images of one data set in the memory of a process, beyond which a warning says so.
MUCH_HELD = 2 * 2**30

LONGEST_PATH = 4096  # Linux's; a longer text is an image itself

_SAID: set[tuple[str, str]] = set()  # what `_say_once` has said


def load_queries(config: DataConfig, which: Side, most: int | None = None) -> list[Query]:
    """All questions that `data.train` or `data.validation` names; of `data.train: sources` those of all sources.

    Columns that `data.fields` does not name become metadata under their own names; a further entry of `data.fields`
    (`choices: options`) renames one, or an entry of one (`choices: extra_info.options`). With `data.format` the columns
    are those of another trainer, as far as `data.fields` does not name others. Without an id column, ids are the row
    numbers.

    A row without question or answer, an answer that no response can give, an id that occurs again, an image that is not
    there, `<image>` marks that do not match the images, text that is no Unicode: such rows are left out, and one
    warning counts them and names the first.
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
    streaming = config.streaming and setting == "data.train"
    reader = Reader(config, open_table(name, split, setting, streaming), which)
    queries = list(islice(reader.queries(), most if streaming else None))
    reader.report()
    if not queries:
        raise reader.nothing()
    return queries


def image_root(config: DataConfig) -> str | None:
    """Where the image paths of `data.train` start; None if `data.image_root` is "": nowhere in particular."""
    if config.image_root is not None:
        return config.image_root or None
    path = Path(os.path.expanduser(config.train))
    return str(path.parent if path.suffix in SUFFIXES else path)


class BadRowError(ConfigError):
    """A row that is left out: the reason it is counted under, and what is wrong with it."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def check_bad_rows(error: ConfigError, bad: int, rows: int, share: float) -> None:
    """Raise the error of one of the bad rows if there are more than the limit.

    The limit is a share, since what is an accident in 100,000 rows is a wrong column in 100. It is rounded down: a data
    set of fewer than 1 / share rows may have none, and one that is wrong altogether stops after that share of its rows.

    Args:
        error: what is wrong with the row to name.
        bad: rows that cannot be used.
        rows: of the data set.
        share: `data.max_bad_rows`.
    """
    limit = int(share * rows)
    if bad > limit:
        more = f" (one of {bad} unusable rows of {rows}; data.max_bad_rows={share:g} allows {limit})" if limit else ""
        raise ConfigError(f"{error}{more}") from error


def find_columns(config: DataConfig, present: list[str], where: str) -> dict[str, str]:
    """Noun to column, or to an entry of one (`extra_info.question`), as `data.format` and `data.fields` say; a missing
    one is an error unless it is optional and not asked for."""
    defaults = DataConfig().fields
    given = {noun: path for noun, path in config.fields.items() if path != defaults.get(noun)}
    used = format_of(config.format, present, given)
    fields = {**defaults, **format_columns(used, present), **given}
    if config.format == "auto" and used is not None:
        nouns = [noun for noun in ("question", "answer", "images") if fields[noun].partition(".")[0] in present]
        read = ", ".join(f"the {noun} from {fields[noun]}" for noun in nouns)
        _say_once(where, "data.format=auto found %s", f"{used or 'plain columns'}, and reads {read}")
    for noun, column in fields.items():
        if column in present or column.partition(".")[0] in present:
            continue
        close = nearest(column, [other for other in present if other not in fields.values()])
        optional = noun in ("images", "id") and column == defaults[noun]
        # A data set without images may be text-only, but `image` beside a wanted `images` is an oversight.
        if optional and not (noun == "images" and close):
            continue
        near = f"; the nearest is {close}: set --data.fields.{noun} {close}" if close else ""
        known = format_of("auto", present, ())
        if noun in ("question", "answer") and known and known != config.format:
            near = f"; these are the columns of {known}: set --data.format {known}"
        elif noun in ("question", "answer") and used is None and config.format == "auto":
            near = f"; no format ({', '.join(FORMATS)}) has these: name the columns in data.fields"
        asked = f" (data.format={used})" if used and noun not in given else ""
        raise ConfigError(
            f"data.fields.{noun}={column}{asked}: {where} has no such column, but {', '.join(present)}{near}"
        )
    return fields


def check_entries(columns: dict[str, str], table: Table) -> None:
    """Check that what is named within a column (`reward_model.ground_truth`) is there in one of the first rows.

    Raises:
        ConfigError: the column has no such entry.
    """
    for noun, path in columns.items():
        if path in table.columns or path.partition(".")[0] not in table.columns:
            continue
        parent, _, _ = path.rpartition(".")
        entries: dict[str, None] = {}
        for row in islice(table.rows(), PEEKED):
            inside = None if isinstance(row, ConfigError) else cell(row, parent)
            entries |= dict.fromkeys(inside) if isinstance(inside, dict) else {}
            if path.removeprefix(f"{parent}.") in entries:
                break
        else:
            named = [f"{parent}.{entry}" for entry in entries]
            close = nearest(path, named)
            near = f"; the nearest is {close}: set --data.fields.{noun} {close}" if close else ""
            has = f"but {', '.join(named)}" if named else f"and {parent} has no entries"
            raise ConfigError(f"data.fields.{noun}={path}: {table.where} has no such entry, {has}{near}")


class Reader:
    """Turns the rows of a data set into the queries that are wanted of it, and counts all others.

    Args:
        config: of the data set.
        table: the data set.
        which: what the queries are for.

    Raises:
        ConfigError: a column that is not there.
    """

    def __init__(self, config: DataConfig, table: Table, which: Side) -> None:
        self.config, self.table, self.which, self.where = config, table, which, table.where
        self.streaming = config.streaming and which == "train"
        self.columns = find_columns(config, table.columns, self.where)
        check_entries(self.columns, table)
        self._root = Path(config.image_root) if config.image_root else table.folder or Path()
        self._main = {self.columns[noun] for noun in ("question", "answer", "images", "id")}
        self._nouns = {column: noun for noun, column in self.columns.items() if column not in self._main}
        self._inner = {column: noun for column, noun in self._nouns.items() if column not in table.columns}
        self._rate = config.pass_rate if which == "train" else None
        others = [str(self._nouns.get(column, column)) for column in table.columns if column not in self._main]
        others += self._inner.values()
        if self._rate is not None and self._rate not in others:
            known = ", ".join(others) or "none besides question, answer, images and id"
            raise ConfigError(f"data.pass_rate={self._rate}: {self.where} has no such column, but {known}")
        self.bad: dict[int, str] = {}
        """The reason why a row, by its number, cannot be used."""
        self._first_bad: ConfigError | None = None
        self._left_out: Counter[str] = Counter()
        self._ids: dict[str, int] = {}
        self._embedded: dict[bytes, dict[str, bytes]] = {}
        self._held = 0  # bytes of the above

    def queries(self) -> Iterator[Query]:
        """The wanted queries, in the order of their rows.

        Raises:
            ConfigError: one bad row too many.
        """
        for number, row in enumerate(self.table.rows()):
            if query := self._wanted(number, row):
                yield query

    def at(self, number: int) -> Query | None:
        """The query of a row, if it is a wanted one; raises as `queries` does."""
        return self._wanted(number, *self.table.between(number, number + 1))

    def _wanted(self, number: int, row: Row) -> Query | None:
        try:
            query = self._query(number, row)
        except BadRowError as error:
            self._first_bad = self._first_bad or error
            if self.streaming and not self.bad:
                _on_one_rank(logging.WARNING, "left out %s; further rows are only counted", error)
            self.bad[number] = error.reason
            check_bad_rows(self._first_bad, len(self.bad), self.table.size, self.config.max_bad_rows)
            return None
        if reason := self._unwanted(query):
            self._left_out[reason] += 1
            return None
        return query

    def report(self) -> None:
        """Log how many rows were left out, and why."""
        size = self.table.size
        if self._left_out:
            counts = _counts(self._left_out)
            _on_one_rank(logging.INFO, "%s: of %d rows not used for %s: %s", self.where, size, self.which, counts)
        if self.bad:
            message = "%s: of %d rows left out %d unusable ones (%s); the first: %s"
            counts = _counts(Counter(self.bad.values()))
            _on_one_rank(logging.WARNING, message, self.where, size, len(self.bad), counts, self._first_bad)

    def nothing(self) -> ConfigError:
        """The error of a data set of which no query is left."""
        if not self._left_out:
            return ConfigError(str(self._first_bad or f"{self.where}: the data set is empty"))
        settings = [f"data.validation_share={self.config.validation_share:g}"] * (self.config.validation == SPLIT)
        settings += [f"data.pass_rate={self._rate}"] * (self._rate is not None)
        return ConfigError(
            f"{self.where}: none of its {self.table.size} rows is left for {self.which} ({_counts(self._left_out)}); "
            f"change {' or '.join(settings)}"
        )

    def _unwanted(self, query: Query) -> str | None:
        """Why a query is not one of those wanted here."""
        if self.config.validation == SPLIT:
            side = side_of(query, self.config.validation_share, image_root(self.config))
            if side != self.which:
                return "images on both sides" if side is None else f"for {side}"
        return why_not(query.metadata.get(self._rate)) if self._rate is not None else None

    def _query(self, number: int, row: Row) -> Query:
        """The row's query.

        Raises:
            BadRowError: the row is to be left out.
        """
        if isinstance(row, ConfigError):
            raise BadRowError("damaged row", str(row))
        own = cell(row, self.columns["id"])
        name = str(number if own is None else own)
        called = f"{self.where}: row {name if len(name) <= 80 else f'{name[:80]}...'}"
        metadata = {self._nouns.get(column, column): value for column, value in row.items() if column not in self._main}
        metadata |= {noun: cell(row, column) for column, noun in self._inner.items()}
        asked, wanted = self.columns["question"], self.columns["answer"]
        named = self.config.format is not None
        try:
            question, shown, system = question_of(cell(row, asked), asked, spelled=named)
            check_shown(row, question, self.config.format)
            given = cell(row, wanted)
            answer = answer_of(given, wanted, undress=named)
            images = tuple(self._images(called, shown or cell(row, self.columns["images"])))
            if named:
                index = isinstance(given, int) and not isinstance(given, bool)
                metadata, answer = with_choices(metadata, answer, index)
        except BadValueError as error:
            raise BadRowError(error.reason, f"{called} {error}") from error
        if not question.strip() and not images:  # with an image, the question may stand in it
            raise BadRowError("no question", f"{called} has an empty question in column {asked!r}")
        self._say_what_is_not_read(system, answer)
        marks = question.count(IMAGE_MARK)
        if marks and marks != len(images):
            raise BadRowError(
                "image marks",
                f"{called} has {marks} {IMAGE_MARK} marks in its question but {len(images)} images; "
                "mark every image once, or none",
            )
        query = Query(name, question, answer, images, metadata)
        _check_text(query, called)
        if self._ids.setdefault(name, number) != number:
            message = f"data.fields.id={self.columns['id']}: the id {name!r} occurs more than once; ids must be unique"
            # Which of the two is drawn first is a matter of the order, which a resumed run has not seen whole.
            raise ConfigError(f"{self.where}: {message}") if self.streaming else BadRowError("repeated id", message)
        return query

    def _say_what_is_not_read(self, system: str | None, answer: str) -> None:
        """One warning each about a chat's system message, and about an answer that `data.format` would undress."""
        if system and system != self.config.system:
            advice = "system messages in the data are left out, as %r; data.system gives one to all questions"
            _say_once(self.where, advice, system)
        if self.config.format is None and dressed(answer):
            advice = "answers such as %r are compared whole; data.format=auto takes the answer out"
            _say_once(self.where, advice, answer[-80:])

    def _images(self, called: str, given: Any) -> Iterator[Any]:
        """The references of all images that a cell holds, in any of the forms of images; lists are flattened."""
        rest = [] if given == "" else [given]
        while rest:
            item = rest.pop()
            if isinstance(item, Mapping) and (held := image_in(item)) is not None:
                rest.append(held)
            elif isinstance(item, (list, tuple)):
                rest += reversed(item)
            elif isinstance(item, (bytes, bytearray)):
                yield self._embedded_image(bytes(item))
            elif isinstance(item, (str, Path)) and str(item):
                path = str(item)
                if len(path) <= LONGEST_PATH:
                    path = str(self._root / os.path.expanduser(path.removeprefix("file://")))
                    if os.path.isfile(path) or in_archive(path):  # through links; no pipe, no device
                        yield path
                        continue
                if (content := image_text(str(item))) is None:
                    hint = "data.image_root says where paths start, and nothing is downloaded"
                    raise BadRowError("no image", f"{called}: no image file {path}; {hint}")
                rest.append(content)
            elif item is not None:
                raise BadRowError(
                    "no image",
                    f"{called} has {kind_of(item)} in the image column {self.columns['images']!r}; "
                    "images are paths, bytes or a list of these",
                )

    def _embedded_image(self, content: bytes) -> dict[str, Any]:
        if self.streaming:  # with a name: as keys of a cache, bytes would stay
            return {"bytes": content, "name": content_name(content)}
        return self._hold(content)

    def _hold(self, content: bytes) -> dict[str, bytes]:
        """The image's reference; equal images are held once."""
        if content not in self._embedded:
            self._embedded[content] = {"bytes": content}
            before, self._held = self._held, self._held + len(content)
            train = self.which == "train"
            # Of a split the training side speaks for both.
            if before <= MUCH_HELD < self._held and (train or self.config.validation != SPLIT):
                advice = "data.streaming=true reads each image when its turn comes, in the same order"
                advice = advice if train else "data.streaming=true does not change that: give fewer questions"
                message = "%s: its embedded images take %.1f GiB so far, in the memory of every process of a node; %s"
                _on_one_rank(logging.WARNING, message, self.where, self._held / 2**30, advice)
        return self._embedded[content]


def _on_one_rank(level: int, message: str, *arguments: Any) -> None:
    """Log on rank 0, since every rank reads the same rows."""
    if os.environ.get("RANK", "0") == "0":
        log.log(level, message, *arguments)


def _say_once(where: str, message: str, text: str) -> None:
    """A warning about a data set that is not said again for further rows, nor when the data is read again."""
    if (where, message) not in _SAID:
        _SAID.add((where, message))
        _on_one_rank(logging.WARNING, f"%s: {message}", where, text if len(text) <= 300 else f"{text[:300]}...")


def _counts(reasons: Counter[str]) -> str:
    """`no answer 2, no question 1`."""
    return ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())


def _check_text(query: Query, called: str) -> None:
    """What the tokenizer and the files of the run cannot take: half a surrogate pair, as a careless cut leaves."""
    words = (value for value in query.metadata.values() if isinstance(value, str))
    for text in (query.id, query.question, query.answer, *words):
        if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
            raise BadRowError("no Unicode", f"{ascii(called)[1:-1]} has a lone surrogate in {ascii(text)[:80]}")
