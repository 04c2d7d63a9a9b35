"""An evaluation's folder: `result.json` (accuracy, interval, categories, versions) and `responses.parquet`."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rethinker.config import ConfigError
from rethinker.evaluation.benchmark import accepted_answers
from rethinker.evaluation.statistics import wilson_interval
from rethinker.samples import Query

if TYPE_CHECKING:
    from rethinker.evaluation.evaluate import Answer

RESULT, RESPONSES = "result.json", "responses.parquet"


def summarize(queries: Sequence[Query], answers: Sequence[Answer]) -> dict[str, Any]:
    """Accuracy over all questions, and what else `result.json` says about the answers.

    A question counts as right at a reward of at least 1, as in validation; one that was left out counts as wrong.
    """
    by_category: dict[str, list[bool]] = {}
    for query, answer in zip(queries, answers, strict=True):
        by_category.setdefault(query.metadata.get("category", "all"), []).append(answer.right)
    given = [answer for answer in answers if answer.completion is not None]
    summary: dict[str, Any] = {
        **_accuracy([answer.right for answer in answers]),
        "by_category": {category: _accuracy(right) for category, right in sorted(by_category.items())},
        "left_out": dict(Counter(answer.left_out for answer in answers if answer.left_out)),
        "unfinished": sum(answer.completion.finish_reason != "stop" for answer in given),
        "response_length_mean": sum(a.completion.tokens for a in given) / max(1, len(given)),
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
    import pyarrow as pa
    import pyarrow.parquet as parquet

    rows = [_row(query, answer) for query, answer in zip(queries, answers, strict=True)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pa.Table.from_pylist(rows, schema=_schema()), folder / RESPONSES, compression="zstd")
        partial = folder / f".{RESULT}.partial"
        partial.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, folder / RESULT)
    except OSError as error:
        raise ConfigError(f"--output {folder}: cannot be written ({error})") from error


def read_result(folder: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """`result.json`, and per question its `query_id`, `question`, `answers` and `reward`.

    Raises:
        ConfigError: the folder holds no complete result.
    """
    import pyarrow as pa
    import pyarrow.parquet as parquet

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
        raise ConfigError(f"{folder}: damaged result ({type(error).__name__}: {str(error).splitlines()[0]})") from error
    return result, rows


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema(
        {
            "query_id": pa.string(),
            "category": pa.string(),
            "question": pa.string(),
            "answers": pa.list_(pa.string()),  # any of them counts
            "response": pa.string(),  # null for a question that was left out
            "reward": pa.float64(),
            "finish_reason": pa.string(),
            "token_ids": pa.list_(pa.int64()),
            "trigger": pa.string(),  # of the second pass
            "trigger_start": pa.int64(),
            "trigger_end": pa.int64(),
            "first_response": pa.string(),
            "first_reward": pa.float64(),
            "rethinks": pa.bool_(),  # of its own accord, in its first answer
            "left_out": pa.string(),
        }
    )


def _row(query: Query, answer: Answer) -> dict[str, Any]:
    completion = answer.completion
    spans = completion.rethought if completion else None
    return {
        "query_id": query.id,
        "category": query.metadata.get("category", "all"),
        "question": query.question,
        "answers": accepted_answers(query),
        "response": completion.text if completion else None,
        "reward": answer.reward,
        "finish_reason": completion.finish_reason if completion else None,
        "token_ids": completion.token_ids.tolist() if completion else None,
        "trigger": spans.name if spans else None,
        "trigger_start": spans.trigger_start if spans else None,
        "trigger_end": spans.trigger_end if spans else None,
        "first_response": answer.first.text if answer.first else None,
        "first_reward": answer.first_reward,
        "rethinks": answer.rethinks,
        "left_out": answer.left_out,
    }


def describe_result(result: dict[str, Any], folder: Path) -> str:
    """What the user reads: the accuracy and its parts as a table, and what qualifies them."""
    lines = [f"{result['title']}, mode {result['mode']}, {result['model']}"]
    table = [("", "questions", "right", "accuracy", "95% interval")]
    parts = result["by_category"] if len(result["by_category"]) > 1 else {}
    for name, entry in {"all": result, **parts}.items():
        low, high = entry["interval"]
        shown = name if name == "all" else f"  {name}"
        table.append(
            (
                shown,
                str(entry["questions"]),
                str(entry["right"]),
                f"{entry['accuracy']:.3f}",
                f"{low:.3f} to {high:.3f}",
            )
        )
    lines += aligned(table)
    if result["second_pass"]:
        second = result["second_pass"]
        lines.append(
            f"second pass on {second['answers']} answers: accuracy {second['first_accuracy']:.3f} -> "
            f"{result['accuracy']:.3f} ({second['wrong_to_right']} mended, {second['right_to_wrong']} spoilt)"
        )
        if second["no_room"]:
            lines.append(f"no room for a second pass: {second['no_room']} (their first answer counts)")
    if result["questions_limit"]:
        lines.append(f"a random sample of {result['questions_in_benchmark']} questions (--limit)")
    elif result["questions_published"] not in (
        None,
        result["questions_in_benchmark"] + sum(result["uncovered"].values()),
    ):
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
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]
