r"""Benchmarks as queries: a small YAML file says which rows, which columns, which prompt, what kind of answer.

The shipped files are in `benchmarks/`; `--benchmark path/to/mine.yaml` takes another. A file has

    title: what the table says
    data: a Hugging Face data set, or a built-in one (`easy_vqa`, `digits`), which needs nothing further
    files: [globs of its parquet files]   (they pick the split and the subsets)
    questions: how many rows the published split has (a local copy with others is told in the result)
    prompt: template; {name} is a column, {choices} the lettered choices; lines left empty are dropped
    answer_kind: given         the answer is a value, or the letter of a choice
                 option        the answer of a multiple-choice question is a choice's text
                 alternatives  the answer of an open question may be a list, any of which counts
                 exact_field   MEGA-Bench: a mapping of one field, judged by equality; other rows are left out
    folder: of its data in $RETHINKER_DATA; by default the benchmark's name
    fields: {id, answer, choices, images: [columns], category}   ("metadata.task" is an entry of a column)
    category_pattern: what to take of the category: a regular expression with one group
or `parts: [names of other benchmarks]`, whose names then are the categories.

The instruction to box the answer is not part of this: `data.prompt` adds it, as in training.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from rethinker.config import ConfigError, DataConfig
from rethinker.data.datasets import load_queries
from rethinker.data.sources import open_table
from rethinker.embedded.files import DATA_SETS, as_files
from rethinker.evaluation.benchmark_data import data_files
from rethinker.evaluation.images_in_text import NotAnImageError, image_references, mark_images
from rethinker.ranges import is_plain_name
from rethinker.samples import Query
from rethinker.settings import read_yaml_file

AnswerKind = Literal["given", "option", "alternatives", "exact_field"]

# MEGA-Bench's metrics that say right or wrong of one text or number.
EXACT_METRICS = frozenset(
    {
        "exact_str_match",
        "exact_str_match_case_insensitive",
        "simple_str_match",
        "general_single_numerical_match",
        "boxed_single_numerical_match",
    }
)


@dataclass(frozen=True)
class Benchmark:
    """One benchmark as its YAML file describes it; see the module."""

    name: str
    title: str
    data: str = ""
    files: tuple[str, ...] = ()
    questions: int | None = None
    prompt: str = "{question}\n{choices}"
    answer_kind: AnswerKind = "given"
    fields: Mapping[str, Any] = field(default_factory=dict)
    category_pattern: str | None = None
    folder: str | None = None
    parts: tuple[str, ...] = ()


def shipped_benchmarks() -> dict[str, Path]:
    """Benchmarks that come with the package, by name."""
    folder = Path(str(resources.files("rethinker"))) / "evaluation" / "benchmarks"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_benchmark(name: str) -> Benchmark:
    """The benchmark of a shipped name or a YAML file.

    Raises:
        ConfigError: there is no such benchmark, or its file does not describe one.
    """
    shipped = shipped_benchmarks()
    path = shipped.get(name) or Path(os.path.expanduser(name))
    if not os.path.isfile(path):
        near = difflib.get_close_matches(name, shipped, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"--benchmark {name}: {hint}known are {', '.join(shipped)}, or give a .yaml file")
    content = read_yaml_file(path, f"--benchmark {name}: {path}")
    try:
        lists = {key: tuple(content[key]) for key in ("files", "parts") if key in content}
        benchmark = Benchmark(**{"name": path.stem, **content, **lists})
    except TypeError as error:
        raise ConfigError(f"--benchmark {name}: {path} does not describe a benchmark ({error})") from error
    fault = _fault(benchmark)
    if fault:
        raise ConfigError(f"--benchmark {name}: {path}: {fault}")
    described = benchmark.parts or benchmark.data in DATA_SETS
    if not described and not (benchmark.data and benchmark.files and benchmark.fields.get("answer")):
        raise ConfigError(f"--benchmark {name}: {path} needs data, files and fields.answer")
    if benchmark.answer_kind not in get_args(AnswerKind):
        kinds = ", ".join(get_args(AnswerKind))
        raise ConfigError(f"--benchmark {name}: answer_kind={benchmark.answer_kind} must be one of {kinds}")
    return benchmark


def _fault(benchmark: Benchmark) -> str | None:
    """What is wrong with the values of a benchmark's file; its names become folders, its globs stay in the data's."""
    texts = ("name", "title", "data", "prompt", "answer_kind")
    if wrong := [key for key in texts if not isinstance(getattr(benchmark, key), str)]:
        return f"{wrong[0]} must be a text"
    if not is_plain_name(benchmark.name):
        return f"name={benchmark.name!r} must be a plain name, without / and not starting with a dot"
    if not all(isinstance(item, str) and item for item in (*benchmark.files, *benchmark.parts)):
        return "files and parts must be lists of texts"
    if not isinstance(benchmark.folder, str | None):
        return "folder must be a text"
    if any(Path(glob).is_absolute() or ".." in Path(glob).parts for glob in (*benchmark.files, benchmark.folder or "")):
        return "files and folder must lie below the data's folder"
    fields = benchmark.fields
    if not isinstance(fields, Mapping) or not all(
        isinstance(value, list if key == "images" else str) and all(isinstance(item, str) for item in value)
        for key, value in fields.items()
    ):
        return "fields must map nouns to columns, and images to a list of them"
    try:
        if benchmark.category_pattern is not None and re.compile(benchmark.category_pattern).groups != 1:
            return f"category_pattern={benchmark.category_pattern!r} must have one group"
    except (re.error, TypeError) as error:
        return f"category_pattern={benchmark.category_pattern!r}: {error}"
    return None


def benchmark_queries(benchmark: Benchmark, data: str | None = None) -> tuple[list[Query], Counter[str]]:
    """All questions of a benchmark in the order of its files, and how many rows it does not cover, by reason.

    Metadata holds `category`, `choices` for multiple-choice questions and `answers` where several are accepted.

    Args:
        benchmark: from `load_benchmark`.
        data: a folder or file that holds its data; by default `$RETHINKER_DATA/<folder>`, else the Hugging Face
            cache or the hub.

    Raises:
        ConfigError: data that is not there, saying what to fetch and where to put it; a column that is missing; a row
            without an answer; an image that is not there.
    """
    if benchmark.parts:
        return _joined_parts(benchmark, data)
    if benchmark.data in DATA_SETS:
        if data is not None:
            raise ConfigError(f"--data {data}: {benchmark.name} comes with the package {benchmark.data}; leave it out")
        own = as_files(DataConfig(validation=benchmark.data), "validation")
        return load_queries(own, "validation"), Counter()
    folder, files = data_files(
        benchmark.name, benchmark.folder or benchmark.name, benchmark.data, benchmark.files, data
    )
    queries: dict[str, Query] = {}
    left_out: Counter[str] = Counter()
    for file in files:
        table = open_table(str(file), "", "--data")
        _check_columns(benchmark, table.columns, file)
        for number, row in enumerate(table.rows):
            name = str(row.get(benchmark.fields.get("id"), f"{file.stem}/{number}"))
            try:
                query = _query(benchmark, name, row, folder)
            except _NotCoveredError as reason:
                left_out[str(reason)] += 1
                continue
            if name in queries:
                raise ConfigError(f"benchmark {benchmark.name}: the id {name!r} occurs twice in {folder}")
            queries[name] = query
    if not queries:
        raise ConfigError(f"benchmark {benchmark.name}: no question in {folder} (left out: {dict(left_out)})")
    return list(queries.values()), left_out


def accepted_answers(query: Query) -> list[str]:
    """The answers of which any counts: one, unless the benchmark has several."""
    return query.metadata.get("answers") or [query.answer]


def _joined_parts(benchmark: Benchmark, data: str | None) -> tuple[list[Query], Counter[str]]:
    queries, left_out = [], Counter()
    for name in benchmark.parts:
        own, uncovered = benchmark_queries(load_benchmark(name), data)
        queries += [
            dataclasses.replace(query, id=f"{name}/{query.id}", metadata={**query.metadata, "category": name})
            for query in own
        ]
        left_out += uncovered
    return queries, left_out


class _NotCoveredError(Exception):
    """A row that a benchmark leaves out by design; the message is the reason."""


def _columns_in(prompt: str) -> list[str]:
    return [name for name in re.findall(r"\{(\w+)\}", prompt) if name != "choices"]


def _check_columns(benchmark: Benchmark, columns: list[str], file: Path) -> None:
    fields = benchmark.fields
    wanted = [
        *fields.get("images", []),
        *(fields[key] for key in ("id", "answer", "choices", "category") if key in fields),
    ]
    for column in [*(name.split(".")[0] for name in wanted), *_columns_in(benchmark.prompt)]:
        if column not in columns:
            raise ConfigError(
                f"benchmark {benchmark.name}: {file} has no column {column!r}, but {', '.join(columns)}; "
                f"is it the data set {benchmark.data}?"
            )


def _query(benchmark: Benchmark, name: str, row: Mapping[str, Any], folder: Path) -> Query:
    where = f"benchmark {benchmark.name}, question {name}"
    fields = benchmark.fields
    choices = _list_of(row.get(fields.get("choices")))
    answer, alternatives = _answer(benchmark, row, choices, where)
    try:
        images = [
            image for column in fields.get("images", []) for image in image_references(row[column], folder, where)
        ]
    except NotAnImageError as error:
        raise _NotCoveredError(str(error)) from error
    metadata: dict[str, Any] = {"category": _category(benchmark, row)}
    if choices:
        metadata["choices"] = choices
    if alternatives:
        metadata["answers"] = alternatives
    # The images' places are marked in the whole text: choices may be images too.
    question, images = mark_images(_fill(benchmark.prompt, row, choices), images)
    return Query(name, question, answer, images, metadata)


def _fill(prompt: str, row: Mapping[str, Any], choices: list[str]) -> str:
    """The prompt with its columns in place; values are not searched for further braces."""

    def value(match: re.Match[str]) -> str:
        if match[1] == "choices":
            return "\n".join(f"({chr(ord('A') + i)}) {choice}" for i, choice in enumerate(choices))
        return str(row[match[1]] or "").strip()

    lines = [re.sub(r"\{(\w+)\}", value, line) for line in prompt.split("\n")]
    return "\n".join(line for line in lines if line.strip())


def _category(benchmark: Benchmark, row: Mapping[str, Any]) -> str:
    value: Any = row
    for key in benchmark.fields.get("category", "").split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    found = re.fullmatch(benchmark.category_pattern, str(value)) if benchmark.category_pattern else None
    return found[1] if found else "all" if value in (None, "") else str(value)


def _answer(
    benchmark: Benchmark, row: Mapping[str, Any], choices: list[str], where: str
) -> tuple[str, list[str] | None]:
    """The answer as the checker takes it, and all accepted ones where there are several."""
    value = row[benchmark.fields["answer"]]
    if benchmark.answer_kind == "exact_field":
        value = _only_field(value, row.get("metric_info"))
    if value is None or not str(value).strip():
        raise ConfigError(
            f"{where}: no answer in column {benchmark.fields['answer']!r}; is it a split without answers?"
        )
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
        raise _NotCoveredError("not one answer field")
    ((name, function),) = functions.items()
    if function not in EXACT_METRICS:
        raise _NotCoveredError(f"metric {function}")
    answer = _literal(answer)
    value = answer.get(name) if isinstance(answer, Mapping) else answer
    if isinstance(value, (list, Mapping)):
        raise _NotCoveredError("an answer that is no single value")
    return value


def _list_of(value: Any) -> list[str]:
    """A list, or one written as text (as MMMU does); [] for nothing and for any other text."""
    value = _literal(value) if isinstance(value, str) and value.strip().startswith("[") else value
    return [str(item) for item in value] if isinstance(value, (list, tuple)) else []


def _literal(text: Any) -> Any:
    """What a text spells in JSON or Python, or the value itself."""
    if not isinstance(text, str):
        return text
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
    return text
