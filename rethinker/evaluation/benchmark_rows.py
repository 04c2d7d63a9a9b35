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
from rethinker.data.datasets import Reader, load_queries
from rethinker.data.sources import Row, Table, open_table
from rethinker.embedded.files import DATA_SETS, as_files
from rethinker.evaluation.benchmark import MATHVISTA, Benchmark, data_files, load_benchmark
from rethinker.rewards.answers import clean
from rethinker.rewards.choices import options_of
from rethinker.rewards.published import MEGABENCH
from rethinker.samples import IMAGE_MARK, Query

NO_ANSWER = "no answer"
# Lists within texts within texts: more quotes than anyone puts around them.
DEEPEST_NESTING = 8
_COLUMN = re.compile(r"\{(\w+)\}")
_NUMBERED = re.compile(r"<image[ _]?(\d+)>")


class NotCoveredError(Exception):
    """A row that a benchmark leaves out, by design or for want of an answer; the message is the reason."""


def benchmark_queries(benchmark: Benchmark, data: str | None = None) -> tuple[list[Query], Counter[str]]:
    """All questions of a benchmark in the order of its files, and how many rows it does not cover, by reason.

    Metadata holds `category`, `choices` for multiple-choice questions, `answers` where several are accepted, and
    `published_metric` where a rule of the benchmark judges them.

    Args:
        benchmark: from `load_benchmark`.
        data: where its data lies; see `benchmark.data_files`.

    Raises:
        ConfigError: data that is not there, saying what to fetch and where to put it; a column that is missing; no row
            with an answer; an image that is not there.
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
    if not covered and left_out[NO_ANSWER]:
        raise ConfigError(
            f"benchmark {benchmark.name}: no question in {folder} has an answer in column {benchmark.fields.answer!r}; "
            f"is it a split without answers? (left out: {dict(left_out)})"
        )
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
    choices = _choices(row[fields.choices]) if fields.choices else []
    answers, metric = _answers(benchmark, row, choices)
    if not answers:
        raise NotCoveredError(NO_ANSWER)
    # The images' places are marked in the whole text: choices may be images too.
    images = [image for column in fields.images for image in images_of(row[column])]
    question, shown = mark_images(_fill(benchmark.prompt, row, choices), images)
    query = {"id": name, "question": question, "answer": answers[0], "images": shown}
    query["category"] = _category(benchmark, row)
    if choices:
        query["choices"] = choices if benchmark.answer_kind == "option" else _without_doubles(choices, answers[0])
    if len(answers) > 1:
        query["answers"] = answers
    return query | ({"published_metric": metric} if metric else {})


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


def _answers(benchmark: Benchmark, row: Mapping[str, Any], choices: list[str]) -> tuple[list[str], str | None]:
    """The accepted answers, as the checker takes them, [] for none; and the published metric that judges them."""
    value, metric = row[benchmark.fields.answer], None if choices else benchmark.metric
    if benchmark.answer_kind == "exact_field":
        value, metric = _only_field(value, row["metric_info"])
    if metric == MATHVISTA:
        metric = _mathvista_metric(row["answer_type"], row["precision"])
    answer = "" if value is None or value != value else str(value)  # NaN, as data frames write nothing
    if benchmark.answer_kind == "option" and answer.strip() and answer in choices:
        return [chr(ord("A") + choices.index(answer))], metric
    several = _list_of(answer) if benchmark.answer_kind == "alternatives" and not choices else []
    return [answer for answer in several or [answer] if answer.strip()], metric


def _mathvista_metric(answer_type: Any, precision: Any) -> str | None:
    """Of a question without choices; its texts and lists have no rule but equality, which the boxed check has too."""
    if answer_type == "float" and isinstance(precision, (int, float)):
        return f"mathvista_float_{precision:g}"
    return "mathvista_integer" if answer_type == "integer" else None


def _only_field(answer: Any, metrics: Any) -> tuple[Any, str]:
    """MEGA-Bench: the value of the one field and its metric, if that says right or wrong."""
    metrics, answer = _literal(metrics), _literal(answer)
    functions = metrics.get("field_score_function", {}) if isinstance(metrics, Mapping) else {}
    if (
        not isinstance(functions, Mapping)
        or len(functions) != 1
        or not isinstance(answer, Mapping)
        or functions.keys() - answer.keys()
    ):
        raise NotCoveredError("not one answer field")
    ((name, function),) = functions.items()
    if not isinstance(function, str) or function not in MEGABENCH:
        raise NotCoveredError(f"metric {function}")
    value = answer[name]
    if isinstance(value, (list, Mapping)):
        raise NotCoveredError("an answer that is no single value")
    return value, function


def _choices(value: Any) -> list[str]:
    """The choices of a question: a list, or one written as text, also within quotes or as the one item of a list."""
    for _ in range(DEEPEST_NESTING):
        listed = _list_of(value)
        if len(listed) > 1 or (listed and not _list_of(listed[0])):
            return listed
        inner = listed[0] if listed else _unquoted(value)
        if inner == value:
            break
        value = inner
    return []


def _unquoted(text: Any) -> Any:
    """A text without one layer of quotes around it, or else of backslashes before the quotes in it."""
    if not isinstance(text, str):
        return text
    try:
        inner = ast.literal_eval(text.strip()) if text.strip()[:1] in ("'", '"') else None
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        inner = None
    return inner if isinstance(inner, str) else re.sub(r"\\(\\*[\"'])", r"\1", text)


def _without_doubles(choices: list[str], answer: str) -> list[str]:
    """The choices as the checker sees them where the answer is a letter: the others of the same text have none.

    The checker lets each of several choices with one text stand for all; a published scorer that compares letters does
    not. A choice without a text is named by its letter alone.
    """
    texts, letter = options_of("", choices, clean), answer.strip().upper()
    if not texts.get(letter):
        return choices
    doubles = {other for other, text in texts.items() if text == texts[letter] and other != letter}
    return ["" if other in doubles else choice for other, choice in zip(texts, choices, strict=True)]


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
