"""The rows of a benchmark as queries: prompt, choices, accepted answers, category, and images in their places.

Benchmarks number their images' marks (`<image 1>`, `<image1>`, `<image_1>`) and may mention an image twice, in the
choices, or not at all; a query marks every image once with `<image>`, in order of appearance, or none.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import mimetypes
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from rethinker.config import ConfigError, DataConfig
from rethinker.data.datasets import IMAGE_MARK, Reader, load_queries
from rethinker.data.sources import Row, Table, open_table
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
    left_out: Counter[str] = Counter()
    if benchmark.parts:
        queries = []
        for name in benchmark.parts:
            own, uncovered = benchmark_queries(load_benchmark(name), data)
            left_out += uncovered
            for query in own:
                metadata = {**query.metadata, "category": name}
                queries.append(dataclasses.replace(query, id=f"{name}/{query.id}", metadata=metadata))
        return queries, left_out
    if benchmark.data.partition(":")[0] in DATA_SETS:
        if data is not None:
            raise ConfigError(f"--data {data}: {benchmark.name} comes with the package {benchmark.data}; leave it out")
        own = as_files(DataConfig(validation=benchmark.data), "validation")
        return load_queries(own, "validation"), left_out
    folder, files = data_files(benchmark, data)

    def rows() -> Iterator[Row]:
        for file in files:
            for number, row in enumerate(open_table(str(file), "", "--data").rows()):
                try:
                    yield row if isinstance(row, ConfigError) else _row(benchmark, f"{file.stem}/{number}", row)
                except NotCoveredError as reason:
                    left_out[str(reason)] += 1
                except KeyError as column:
                    raise ConfigError(
                        f"benchmark {benchmark.name}: {file} has no column {column}, but {', '.join(row)}; is it the "
                        f"data set {benchmark.data}?"
                    ) from None

    where = f"benchmark {benchmark.name}, whose image paths start from {folder}"
    covered = list(rows())
    columns = ["id", "question", "answer", "images"]
    table = Table(where, columns, len(covered), folder, lambda start, stop: covered[start:stop])
    queries = list(Reader(DataConfig(max_bad_rows=0.0), table, "validation").queries())
    if not queries:
        raise ConfigError(f"benchmark {benchmark.name}: no question in {folder} (left out: {dict(left_out)})")
    return queries, left_out


def _row(benchmark: Benchmark, place: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """The row as `data/` reads it; without a column of ids its place is its id. A KeyError names a missing column."""
    fields = benchmark.fields
    name = str(row[fields.id]) if fields.id else place
    choices = _list_of(row[fields.choices]) if fields.choices else []
    answers = _answers(benchmark, row, choices)
    if not answers[0].strip():
        raise ConfigError(
            f"benchmark {benchmark.name}: question {name} has no answer in column {fields.answer!r}; is it a split "
            "without answers?"
        )
    # The images' places are marked in the whole text: choices may be images too.
    images = [image for column in fields.images for image in images_of(row[column])]
    question, shown = mark_images(_fill(benchmark.prompt, row, choices), images)
    query = {"id": name, "question": question, "answer": answers[0], "images": shown}
    query["category"] = _category(benchmark, row)
    return query | ({"choices": choices} if choices else {}) | ({"answers": answers} if len(answers) > 1 else {})


def _fill(prompt: str, row: Mapping[str, Any], choices: list[str]) -> str:
    """The prompt with its columns in place; values are not searched for further braces."""
    lettered = "\n".join(f"({chr(ord('A') + i)}) {choice}" for i, choice in enumerate(choices))

    def value(match: re.Match[str]) -> str:
        return lettered if match[1] == "choices" else "" if row[match[1]] in (None, []) else str(row[match[1]]).strip()

    return "\n".join(filled for line in prompt.split("\n") if (filled := _COLUMN.sub(value, line)).strip())


def _category(benchmark: Benchmark, row: Mapping[str, Any]) -> str:
    column, *entries = benchmark.fields.category.split(".")
    value = row[column] if column else None
    for entry in entries:
        value = value.get(entry) if isinstance(value, Mapping) else None
    found = benchmark.category_pattern and benchmark.category_pattern.fullmatch(str(value))
    return found[1] if found else "all" if value in (None, "") else str(value)


def _answers(benchmark: Benchmark, row: Mapping[str, Any], choices: list[str]) -> list[str]:
    """The accepted answers, as the checker takes them; [""] for none."""
    value = row[benchmark.fields.answer]
    if benchmark.answer_kind == "exact_field":
        value = _only_field(value, row["metric_info"])
    answer = "" if value is None else str(value)
    if benchmark.answer_kind == "option" and answer in choices:
        return [chr(ord("A") + choices.index(answer))]
    return (not choices and benchmark.answer_kind == "alternatives" and _list_of(answer)) or [answer]


def _only_field(answer: Any, metrics: Any) -> Any:
    """MEGA-Bench: the value of the one field, if equality judges it."""
    metrics, answer = _literal(metrics), _literal(answer)
    functions = metrics.get("field_score_function", {}) if isinstance(metrics, Mapping) else {}
    if len(functions) != 1 or not isinstance(answer, Mapping) or functions.keys() - answer.keys():
        raise NotCoveredError("not one answer field")
    ((name, function),) = functions.items()
    if function not in EXACT_METRICS:
        raise NotCoveredError(f"metric {function}")
    value = answer[name]
    if isinstance(value, (list, Mapping)):
        raise NotCoveredError("an answer that is no single value")
    return value


def _list_of(value: Any) -> list[str]:
    """A list, or one written as text (as MMMU does); [] for nothing and for any other text."""
    value = _literal(value)
    return [str(item) for item in value] if isinstance(value, (list, tuple)) else []


def _literal(text: Any) -> Any:
    """The list or mapping that a text spells in JSON or Python, or the value itself."""
    spelled = isinstance(text, str) and text.lstrip().startswith(("[", "{"))
    for read in (json.loads, ast.literal_eval) if spelled else ():
        try:
            return read(text)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
    return text


def images_of(value: Any) -> list[Any]:
    """What a column holds: `[None]` for an image that is absent, else the bytes or the path of each image.

    Args:
        value: bytes, `{"bytes", "path"}`, a path, a list of these (also spelled as text), or nothing.

    Raises:
        NotCoveredError: for a video.
    """
    value = _literal(value)
    if isinstance(value, (list, tuple)):
        return [image for item in value for image in images_of(item)]
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and (mimetypes.guess_type(value)[0] or "").startswith("video"):
        raise NotCoveredError("a video")
    return [value or None]


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
