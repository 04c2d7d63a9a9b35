r"""Benchmarks: a small YAML file says which rows, which columns, which prompt, what kind of answer.

The shipped files are in `benchmarks/`; `--benchmark path/to/mine.yaml` takes another. A file has

    title: what the table says
    data: a Hugging Face data set, or a built-in one (`easy_vqa`, `sums:test`), which needs nothing further
    files: [globs of its parquet files]   (they pick the split and the subsets)
    questions: how many rows the published split has (a local copy with others is noted in the result)
    prompt: template; {name} is a column, {choices} the lettered choices; lines left empty are dropped
    answer_kind: given         the answer is a value, or the letter of a choice
                 option        the answer of a multiple-choice question is a choice's text
                 alternatives  the answer of an open question may be a list, any of which counts
                 exact_field   MEGA-Bench: a mapping of one field, judged by its metric; other rows are left out
    metric: of open questions: a name of `rewards/published.py`, or `mathvista` (by the columns answer_type and
        precision); without one they are judged as in training
    folder: of its data in $RETHINKER_DATA; by default the benchmark's name
    fields: {id, answer, choices, images: [columns], category}   ("metadata.task" is an entry of a column)
    category_pattern: what to take of the category: a regular expression with one group
or `parts: [names of other benchmarks]`, whose names then are the categories.

A row without an answer is left out and counted. Choices may be a list, or one written as text, however quoted. Of
choices with the same text only the letter counts that is the answer, but each of them if the answer is that text.

The instruction to box the answer is not part of this: `data.prompt` adds it, as in training.
"""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import TypeAdapter, ValidationError

from rethinker.config import ConfigError, nearest, one_line
from rethinker.data.sources import hub_answers
from rethinker.embedded.files import DATA_SETS
from rethinker.ranges import FolderName
from rethinker.rewards.published import METRICS
from rethinker.settings import read_yaml_file

# A metric by the columns answer_type and precision.
MATHVISTA = "mathvista"


@dataclass(frozen=True)
class Fields:
    """Which column holds what."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    answer: str = ""
    id: str | None = None
    choices: str | None = None
    images: list[str] = field(default_factory=list)
    category: str = ""


@dataclass(frozen=True)
class Benchmark:
    """One benchmark as its YAML file describes it; see the module."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    name: FolderName
    title: str
    data: str = ""
    files: list[str] = field(default_factory=list)
    questions: int | None = None
    prompt: str = "{question}\n{choices}"
    answer_kind: Literal["given", "option", "alternatives", "exact_field"] = "given"
    metric: str | None = None
    fields: Fields = field(default_factory=Fields)
    category_pattern: re.Pattern[str] | None = None
    folder: str | None = None
    parts: list[str] = field(default_factory=list)


def shipped_benchmarks() -> dict[str, Path]:
    """Benchmarks that come with the package, by name."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "benchmarks").glob("*.yaml"))}


def load_benchmark(name: str) -> Benchmark:
    """The benchmark of a shipped name or a YAML file.

    Raises:
        ConfigError: there is no such benchmark, or its file does not describe one.
    """
    shipped = shipped_benchmarks()
    path = shipped.get(name) or Path(os.path.expanduser(name))
    if not os.path.isfile(path):
        near = nearest(name, shipped)
        hint = f"did you mean {near}? " if near else ""
        raise ConfigError(f"--benchmark {name}: {hint}known are {', '.join(shipped)}, or give a .yaml file")
    content = read_yaml_file(path, f"--benchmark {name}: {path}")
    try:
        benchmark = TypeAdapter(Benchmark).validate_python({"name": path.stem, **content})
    except (ValidationError, TypeError) as error:
        raise ConfigError(f"--benchmark {name}: {path} does not describe a benchmark ({one_line(error)})") from error
    if fault := _fault(benchmark):
        raise ConfigError(f"--benchmark {name}: {path}: {fault}")
    return benchmark


def _fault(benchmark: Benchmark) -> str | None:
    """What is wrong with a benchmark of the right types."""
    if any(Path(p).is_absolute() or ".." in Path(p).parts for p in (*benchmark.files, benchmark.folder or "")):
        return "files and folder must lie below the data's folder"
    if benchmark.category_pattern and benchmark.category_pattern.groups != 1:
        return f"category_pattern={benchmark.category_pattern.pattern!r} must have one group"
    if benchmark.metric not in (None, MATHVISTA, *METRICS):
        return f"metric={benchmark.metric!r} is none of {', '.join(sorted([MATHVISTA, *METRICS]))}"
    described = benchmark.data and benchmark.files and benchmark.fields.answer
    if not (described or benchmark.parts or benchmark.data.partition(":")[0] in DATA_SETS):
        return "it needs data, files and fields.answer"
    return None


def data_files(benchmark: Benchmark, data: str | None) -> tuple[Path, list[Path]]:
    """The folder of a benchmark's data and its files in it, in order.

    Args:
        benchmark: that is neither built in nor made of parts.
        data: a folder laid out as the published data set, or one .parquet or .jsonl file; None looks in
            `$RETHINKER_DATA/<folder>`, then in the Hugging Face cache, then on the hub.

    Raises:
        ConfigError: they are nowhere; the message says what to fetch and where to put it.
    """
    kept = Path(os.environ.get("RETHINKER_DATA", "")).expanduser() / (benchmark.folder or benchmark.name)
    include = " ".join(f"--include {shlex.quote(pattern)}" for pattern in benchmark.files)
    fetch = (
        f"where there is a network run `hf download {benchmark.data} --repo-type dataset {include} --local-dir "
        f"{shlex.quote(str(data or kept))}`, then name that folder with --data, or its parent in RETHINKER_DATA"
    )
    if data is not None:
        folder = Path(data).expanduser()
        if folder.is_file():
            return folder.parent, [folder]
    elif "RETHINKER_DATA" in os.environ and kept.is_dir():
        folder = kept
    else:
        try:
            from huggingface_hub import snapshot_download

            options = {"allow_patterns": benchmark.files, "local_files_only": not hub_answers(benchmark.data)}
            folder = Path(snapshot_download(benchmark.data, repo_type="dataset", **options))
        except Exception as error:  # its client raises anything from ValueError to OSError
            raise ConfigError(
                f"benchmark {benchmark.name}: its data is neither in $RETHINKER_DATA ({kept}) nor in the Hugging Face "
                f"cache, and the hub does not give it ({one_line(error, 120)}); {fetch}"
            ) from error
    files = [file for pattern in benchmark.files for file in sorted(folder.glob(pattern))]
    if not files:
        wanted = ", ".join(benchmark.files)
        raise ConfigError(f"{folder} holds no {wanted}, which benchmark {benchmark.name} reads; {fetch}")
    return folder, files
