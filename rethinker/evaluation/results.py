"""An evaluation's folder: `result.json` (accuracy, interval, categories, versions) and `responses.parquet`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
from scipy.stats import binomtest

from rethinker.algorithm.rethinking import rethinks
from rethinker.config import ConfigError, one_line
from rethinker.runtime.files import whole_file
from rethinker.samples import Completion, Query

RESULT, RESPONSES = "result.json", "responses.parquet"


@dataclass(frozen=True)
class Answer:
    """What a question got: the response that counts and, where it was made to rethink, the one from before."""

    completion: Completion | None
    """None for a question that does not fit (see `left_out`)."""
    reward: float = 0.0
    first: Completion | None = None
    first_reward: float | None = None
    left_out: str | None = None
    """The setting whose limit the question exceeds; it counts as wrong."""
    no_room: bool = False
    """It should have rethought, but the first answer left no room."""

    @property
    def right(self) -> bool:
        return self.reward >= 1.0

    @property
    def was_right(self) -> bool:
        """Whether the first answer was right; the answer itself if there was no second pass."""
        return (self.reward if self.first_reward is None else self.first_reward) >= 1.0

    @property
    def rethinks(self) -> bool:
        """Whether the first answer rethinks of its own accord."""
        first = self.first or self.completion
        return first is not None and rethinks(first.text)


def wilson_interval(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95% score interval of a share `right / n`; (0, 1) without questions.

    Source: Wilson (1927); Newcombe (1998), Statistics in Medicine 17:857, method 3.
    """
    return tuple(map(float, binomtest(right, n).proportion_ci(0.95, "wilson"))) if n else (0.0, 1.0)


def summarize(queries: Sequence[Query], answers: Sequence[Answer]) -> dict[str, Any]:
    """Accuracy over all questions, and what else `result.json` says about the answers.

    A question counts as right at a reward of at least 1, as in validation; one that was left out counts as wrong.
    """
    by_category: dict[str, list[bool]] = {}
    for query, answer in zip(queries, answers, strict=True):
        by_category.setdefault(query.metadata.get("category", "all"), []).append(answer.right)
    given = [answer.completion for answer in answers if answer.completion is not None]
    summary: dict[str, Any] = {
        **_accuracy([answer.right for answer in answers]),
        "by_category": {category: _accuracy(right) for category, right in sorted(by_category.items())},
        "left_out": dict(Counter(answer.left_out for answer in answers if answer.left_out)),
        "unfinished": sum(completion.finish_reason != "stop" for completion in given),
        "response_length_mean": sum(completion.tokens for completion in given) / max(1, len(given)),
        "rethink_ratio": sum(answer.rethinks for answer in answers) / max(1, len(answers)),
    }
    again = [answer for answer in answers if answer.first is not None]
    if again or any(answer.no_room for answer in answers):
        summary["second_pass"] = {
            "answers": len(again),
            "no_room": sum(answer.no_room for answer in answers),
            "first_accuracy": sum(answer.was_right for answer in answers) / len(answers),
            "wrong_to_right": sum(answer.right and not answer.was_right for answer in again),
            "right_to_wrong": sum(answer.was_right and not answer.right for answer in again),
        }
    return summary


def _accuracy(right: list[bool]) -> dict[str, Any]:
    count, n = sum(right), len(right)
    return {"questions": n, "right": count, "accuracy": count / max(1, n), "interval": list(wilson_interval(count, n))}


def write_result(folder: Path, result: dict[str, Any], queries: Sequence[Query], answers: Sequence[Answer]) -> None:
    """Write the responses, then `result.json`: a folder that has it is complete.

    Raises:
        ConfigError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        parquet.write_table(_responses(queries, answers), folder / RESPONSES, compression="zstd")
        with whole_file(folder / RESULT) as path:
            path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {folder}: cannot be written ({error})") from error


def read_result(folder: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """`result.json`, and per question its `query_id`, `question`, `answers` and `reward`.

    Raises:
        ConfigError: the folder holds no complete result.
    """
    path = Path(folder).expanduser()
    if not (path / RESULT).is_file():
        inside = sorted(p.parent for p in path.glob(f"*/{RESULT}"))
        hint = f"; did you mean {inside[0]}?" if inside else ""
        raise ConfigError(f"{folder} holds no {RESULT}: give the folder that `rethinker eval` wrote{hint}")
    columns = ["query_id", "question", "answers", "reward"]
    try:
        result = json.loads((path / RESULT).read_text(encoding="utf-8"))
        rows = parquet.read_table(path / RESPONSES, columns=columns).to_pylist()
    except (ValueError, OSError, pa.ArrowException) as error:
        raise ConfigError(f"{folder}: damaged result ({one_line(error)})") from error
    return result, rows


def _responses(queries: Sequence[Query], answers: Sequence[Answer]) -> Any:
    """The table of `responses.parquet`."""
    text, number, place = pa.string(), pa.float64(), pa.int64()
    completions = [answer.completion for answer in answers]
    spans = [completion and completion.rethought for completion in completions]

    def column(kind: Any, items: Sequence[Any], name: str) -> Any:
        """An attribute of every item; null where there is no item."""
        return pa.array([item and getattr(item, name) for item in items], kind)

    return pa.table(
        {
            "query_id": column(text, queries, "id"),
            "category": pa.array([query.metadata.get("category", "all") for query in queries], text),
            "question": column(text, queries, "question"),
            "answers": pa.array(map(accepted_answers, queries), pa.list_(text)),  # any of them counts
            "response": column(text, completions, "text"),  # null for a question that was left out
            "reward": column(number, answers, "reward"),
            "finish_reason": column(text, completions, "finish_reason"),
            "token_ids": column(pa.list_(place), completions, "token_ids"),
            "trigger": column(text, spans, "name"),  # of the second pass
            "trigger_start": column(place, spans, "trigger_start"),
            "trigger_end": column(place, spans, "trigger_end"),
            "first_response": column(text, [answer.first for answer in answers], "text"),
            "first_reward": column(number, answers, "first_reward"),
            "rethinks": column(pa.bool_(), answers, "rethinks"),  # of its own accord, in its first answer
            "left_out": column(text, answers, "left_out"),
        }
    )


def accepted_answers(query: Query) -> list[str]:
    """The answers of which any counts: one, unless the benchmark has several."""
    return query.metadata.get("answers") or [query.answer]


def describe_result(result: dict[str, Any], folder: Path) -> str:
    """What the user reads: the accuracy and its parts as a table, and what qualifies them."""
    lines = [f"{result['title']}, mode {result['mode']}, {result['model']}"]
    parts = result["by_category"] if len(result["by_category"]) > 1 else {}
    table = [("", "questions", "right", "accuracy", "95% interval")]
    for name, entry in {"all": result, **{f"  {name}": entry for name, entry in parts.items()}}.items():
        share, interval = f"{entry['accuracy']:.3f}", "{:.3f} to {:.3f}".format(*entry["interval"])
        table.append((name, str(entry["questions"]), str(entry["right"]), share, interval))
    lines += aligned(table)
    if second := result["second_pass"]:
        lines.append(
            f"second pass on {second['answers']} answers: accuracy {second['first_accuracy']:.3f} -> "
            f"{result['accuracy']:.3f} ({second['wrong_to_right']} became right, {second['right_to_wrong']} wrong)"
        )
        if second["no_room"]:
            lines.append(f"no room for a second pass: {second['no_room']} (their first answer counts)")
    covered = result["questions_in_benchmark"]
    if result["questions_limit"]:
        lines.append(f"a random sample of {covered} questions (--limit)")
    elif result["questions_published"] not in (None, covered + sum(result["uncovered"].values())):
        lines.append(f"note: the published benchmark has {result['questions_published']} questions")
    for key, text in (
        ("uncovered", "not covered by this benchmark's rules"),
        ("left_out", "left out, counted as wrong"),
        ("failed_checks", "checks that failed, counted as wrong"),
    ):
        if result[key]:
            reasons = ", ".join(f"{reason} {count}" for reason, count in result[key].items())
            lines.append(f"{text}: {sum(result[key].values())} ({reasons})")
    if result["unfinished"]:
        limit = result["settings"]["rollout.max_new_tokens"]
        lines.append(f"unfinished: {result['unfinished']} answers reached rollout.max_new_tokens={limit}")
    return "\n".join([*lines, f"responses and {RESULT} in {folder}"])


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(row[1:], widths[1:], strict=True))])
        for row in table
    ]
