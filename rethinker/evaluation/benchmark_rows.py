"""The rows of a benchmark as queries: prompt, choices, accepted answers, category, and images in their places.

Benchmarks number their images' marks (`<image 1>`, `<image1>`, `<image_1>`) and may mention an image twice, in the
choices, or not at all; a query marks every image once with `<image>`, in order of appearance, or none.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import mimetypes
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rethinker.config import ConfigError, DataConfig
from rethinker.data.datasets import IMAGE_MARK, load_queries
from rethinker.data.sources import open_table
from rethinker.embedded.files import DATA_SETS, as_files
from rethinker.evaluation.benchmark import Benchmark, data_files, load_benchmark
from rethinker.samples import Query

# MEGA-Bench's metrics that say right or wrong of one text or number.
EXACT_METRICS = frozenset(
    "exact_str_match exact_str_match_case_insensitive simple_str_match general_single_numerical_match "
    "boxed_single_numerical_match".split()
)
_COLUMN = re.compile(r"\{(\w+)\}")
_NUMBERED = re.compile(r"<image[ _]?(\d+)>")


class NotCoveredError(Exception):
    """A row that a benchmark leaves out by design; the message is the reason."""


def benchmark_queries(benchmark: Benchmark, data: str | None = None) -> tuple[list[Query], Counter[str]]:
    """All questions of a benchmark in the order of its files, and how many rows it does not cover, by reason.

    Metadata holds `category`, `choices` for multiple-choice questions and `answers` where several are accepted.

    Args:
        benchmark: from `load_benchmark`.
        data: where its data lies; see `benchmark.data_files`.

    Raises:
        ConfigError: data that is not there, saying what to fetch and where to put it; a column that is missing; a row
            without an answer; an image that is not there.
    """
    queries: dict[str, Query] = {}
    left_out: Counter[str] = Counter()
    for name in benchmark.parts:
        own, uncovered = benchmark_queries(load_benchmark(name), data)
        left_out += uncovered
        for query in own:
            metadata = {**query.metadata, "category": name}
            queries[f"{name}/{query.id}"] = dataclasses.replace(query, id=f"{name}/{query.id}", metadata=metadata)
    if benchmark.parts:
        return list(queries.values()), left_out
    if benchmark.data in DATA_SETS:
        if data is not None:
            raise ConfigError(f"--data {data}: {benchmark.name} comes with the package {benchmark.data}; leave it out")
        own = as_files(DataConfig(validation=benchmark.data), "validation")
        return load_queries(own, "validation"), left_out
    folder, files = data_files(benchmark, data)
    for file in files:
        table = open_table(str(file), "", "--data")
        _check_columns(benchmark, table.columns, file)
        for number, row in enumerate(table.rows()):
            if isinstance(row, ConfigError):
                raise row
            name = str(row.get(benchmark.fields.id, f"{file.stem}/{number}"))
            try:
                query = _query(benchmark, name, row, folder)
            except NotCoveredError as reason:
                left_out[str(reason)] += 1
                continue
            if name in queries:
                raise ConfigError(f"benchmark {benchmark.name}: the id {name!r} occurs twice in {folder}")
            queries[name] = query
    if not queries:
        raise ConfigError(f"benchmark {benchmark.name}: no question in {folder} (left out: {dict(left_out)})")
    return list(queries.values()), left_out


def _check_columns(benchmark: Benchmark, columns: list[str], file: Path) -> None:
    fields = benchmark.fields
    nouns = (*fields.images, fields.id, fields.answer, fields.choices, fields.category)
    wanted = [name.split(".")[0] for name in nouns if name]
    wanted += [name for name in _COLUMN.findall(benchmark.prompt) if name != "choices"]
    for column in wanted:
        if column not in columns:
            raise ConfigError(
                f"benchmark {benchmark.name}: {file} has no column {column!r}, but {', '.join(columns)}; "
                f"is it the data set {benchmark.data}?"
            )


def _query(benchmark: Benchmark, name: str, row: Mapping[str, Any], folder: Path) -> Query:
    where, fields = f"benchmark {benchmark.name}, question {name}", benchmark.fields
    choices = _list_of(row.get(fields.choices))
    answer, alternatives = _answer(benchmark, row, choices, where)
    images = [image for column in fields.images for image in image_references(row[column], folder, where)]
    metadata: dict[str, Any] = {"category": _category(benchmark, row)}
    if choices:
        metadata["choices"] = choices
    if alternatives:
        metadata["answers"] = alternatives
    # The images' places are marked in the whole text: choices may be images too.
    question, shown = mark_images(_fill(benchmark.prompt, row, choices), images)
    return Query(name, question, answer, shown, metadata)


def _fill(prompt: str, row: Mapping[str, Any], choices: list[str]) -> str:
    """The prompt with its columns in place; values are not searched for further braces."""

    def value(match: re.Match[str]) -> str:
        if match[1] == "choices":
            return "\n".join(f"({chr(ord('A') + i)}) {choice}" for i, choice in enumerate(choices))
        return str(row[match[1]] or "").strip()

    return "\n".join(filled for line in prompt.split("\n") if (filled := _COLUMN.sub(value, line)).strip())


def _category(benchmark: Benchmark, row: Mapping[str, Any]) -> str:
    value: Any = row
    for key in benchmark.fields.category.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    found = re.fullmatch(benchmark.category_pattern, str(value)) if benchmark.category_pattern else None
    return found[1] if found else "all" if value in (None, "") else str(value)


def _answer(
    benchmark: Benchmark, row: Mapping[str, Any], choices: list[str], where: str
) -> tuple[str, list[str] | None]:
    """The answer as the checker takes it, and all accepted ones where there are several."""
    column = benchmark.fields.answer
    value = _only_field(row[column], row.get("metric_info")) if benchmark.answer_kind == "exact_field" else row[column]
    if value is None or not str(value).strip():
        raise ConfigError(f"{where}: no answer in column {column!r}; is it a split without answers?")
    answer = str(value)
    if benchmark.answer_kind == "option" and answer in choices:
        return chr(ord("A") + choices.index(answer)), None
    if benchmark.answer_kind == "alternatives" and not choices and len(several := _list_of(answer)) > 1:
        return several[0], several
    return answer, None


def _only_field(answer: Any, metrics: Any) -> Any:
    """MEGA-Bench: the value of the one field, if equality judges it."""
    metrics = _literal(metrics)
    functions = metrics.get("field_score_function") if isinstance(metrics, Mapping) else None
    if not isinstance(functions, Mapping) or len(functions) != 1:
        raise NotCoveredError("not one answer field")
    ((name, function),) = functions.items()
    if function not in EXACT_METRICS:
        raise NotCoveredError(f"metric {function}")
    answer = _literal(answer)
    value = answer.get(name) if isinstance(answer, Mapping) else answer
    if isinstance(value, (list, Mapping)):
        raise NotCoveredError("an answer that is no single value")
    return value


def _list_of(value: Any) -> list[str]:
    """A list, or one written as text (as MMMU does); [] for nothing and for any other text."""
    value = _literal(value) if isinstance(value, str) and value.strip().startswith("[") else value
    return [str(item) for item in value] if isinstance(value, (list, tuple)) else []


def _literal(text: Any) -> Any:
    """What a text spells in JSON or Python, or the value itself."""
    for read in (json.loads, ast.literal_eval) if isinstance(text, str) else ():
        try:
            return read(text)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
    return text


def image_references(value: Any, folder: Path, where: str) -> list[Any]:
    """What a column holds: `[None]` for an image that is absent, else a reference for each image.

    Args:
        value: bytes, `{"bytes", "path"}`, a path from `folder`, a list of these (also spelled as text), or nothing.
        folder: where relative paths start.
        where: benchmark and question, for messages.

    Raises:
        NotCoveredError: for a video.
        ConfigError: a path that does not exist.
    """
    if isinstance(value, str) and value.strip().startswith("["):
        value = _literal(value)
        if isinstance(value, str):
            raise ConfigError(f"{where}: no list of images: {value[:80]!r}")
    if isinstance(value, (list, tuple)):
        return [reference for item in value for reference in image_references(item, folder, where)]
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if not value:
        return [None]
    if isinstance(value, (bytes, bytearray)):
        return [{"bytes": bytes(value)}]
    if (mimetypes.guess_type(str(value))[0] or "").startswith("video"):
        raise NotCoveredError("a video")
    path = folder / str(value)
    if not os.path.isfile(path):  # nor a pipe or a device
        raise ConfigError(f"{where}: no image file {path}; unpack the data set's images in {folder}")
    return [str(path)]


def mark_images(text: str, images: list[Any]) -> tuple[str, tuple[Any, ...]]:
    """Mark the place of every image once.

    Args:
        text: with numbered marks, with plain `<image>` marks, or with none.
        images: number i is `images[i - 1]`; None where there is none.

    Returns:
        The text and the images in order of appearance. Images without a place come first; a second mention becomes
        "image 2", as does the mark of an image that is absent. Plain marks stay if they are as many as the images.
    """
    present = [i for i, image in enumerate(images) if image is not None]
    mentioned = [int(number) - 1 for number in _NUMBERED.findall(text)]
    if mentioned or text.count(IMAGE_MARK) != len(present):
        text = text.replace(IMAGE_MARK, "image")
    if not mentioned:
        return text, tuple(images[i] for i in present)
    unplaced = [i for i in present if i not in mentioned]
    order = [*unplaced, *(i for i in dict.fromkeys(mentioned) if i in present)]
    marked: set[int] = set()

    def replace(match: re.Match[str]) -> str:
        i = int(match[1]) - 1
        if i in order and i not in marked:
            marked.add(i)
            return IMAGE_MARK
        return f"image {order.index(i) + 1}" if i in order else f"image {match[1]}"

    return IMAGE_MARK * len(unplaced) + _NUMBERED.sub(replace, text), tuple(images[i] for i in order)
