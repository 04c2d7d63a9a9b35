"""An evaluation's folder: `result.json` (accuracy, interval, categories, versions) and `responses.parquet`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as parquet

from rethinker.algorithm.rethinking import rethinks
from rethinker.config import ConfigError, one_line
from rethinker.evaluation.intervals import wilson_interval
from rethinker.runtime.files import whole_file
from rethinker.samples import Completion, Query

RESULT, RESPONSES = "result.json", "responses.parquet"

# What a question got, and the columns of responses.parquet.
ROW = pa.schema(
    {
        "query_id": pa.string(),
        "category": pa.string(),
        "question": pa.string(),
        "answers": pa.list_(pa.string()),  # any of them counts
        "response": pa.string(),  # that counts; null for a question that was left out
        "reward": pa.float64(),
        "finish_reason": pa.string(),
        "token_ids": pa.list_(pa.int64()),
        "turns": pa.int64(),  # of the model; with its tool calls and failures null where no environment answers it
        "calls": pa.int64(),
        "failures": pa.list_(pa.string()),
        "trigger": pa.string(),  # of the second pass; so are its place and the first response
        "trigger_start": pa.int64(),
        "trigger_end": pa.int64(),
        "first_response": pa.string(),
        "first_reward": pa.float64(),
        "rethinks": pa.bool_(),  # of its own accord, in its first answer
        "no_room": pa.bool_(),  # it should have rethought, but the first answer left no room
        "left_out": pa.string(),  # the setting whose limit the question exceeds
    }
)


def unanswered(query: Query, left_out: str | None) -> dict[str, Any]:
    """The row of a question that has no answer (yet): it counts as wrong."""
    asked = {"query_id": query.id, "question": query.question, "answers": accepted_answers(query)}
    asked |= {"category": query.metadata.get("category", "all"), "left_out": left_out}
    return dict.fromkeys(ROW.names) | asked | {"reward": 0.0, "rethinks": False, "no_room": False}


def answered(row: dict[str, Any], completion: Completion, reward: float) -> dict[str, Any]:
    """The row of a question with its answer, or with its second one; the first then stands beside it."""
    again = completion.rethought
    first = {"first_response": row["response"], "first_reward": row["reward"]} if again else {}
    spans = (
        {"trigger": again.name, "trigger_start": again.trigger_start, "trigger_end": again.trigger_end} if again else {}
    )
    cue = row["rethinks"] if again else rethinks(completion.text)
    said = {"response": completion.text, "finish_reason": completion.finish_reason, "reward": reward, "rethinks": cue}
    return row | first | spans | said | {"token_ids": completion.token_ids.astype("int64")}


def conversed(completion: Completion) -> dict[str, Any]:
    """What a row has besides where an environment answers the model."""
    return {"turns": completion.turns, "calls": completion.calls, "failures": list(completion.failures)}


def accepted_answers(query: Query) -> list[str]:
    """The answers of which any counts: one, unless the benchmark has several."""
    return query.metadata.get("answers") or [query.answer]


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy over all questions, and what else `result.json` says about the answers.

    A question counts as right at a reward of at least 1, as in validation; one that was left out counts as wrong.
    """
    table = pd.DataFrame(rows)
    right = table.reward >= 1.0
    summary: dict[str, Any] = {
        **_accuracy(right),
        "by_category": {category: _accuracy(own) for category, own in right.groupby(table.category)},
        "left_out": table.left_out.value_counts().to_dict(),
        "unfinished": int((table.finish_reason == "length").sum()),
        "rethink_ratio": float(table.rethinks.mean()),
        "environment": _environment(table[table.turns.notna()]),
        "second_pass": None,
    }
    again = table.first_reward.notna()
    if again.any() or table.no_room.any():
        was_right = table.first_reward.astype(float).fillna(table.reward) >= 1.0
        summary["second_pass"] = {
            "answers": int(again.sum()),
            "no_room": int(table.no_room.sum()),
            "first_accuracy": float(was_right.mean()),
            "wrong_to_right": int((right & ~was_right).sum()),
            "right_to_wrong": int((was_right & ~right).sum()),
        }
    return summary


def _environment(table: pd.DataFrame) -> dict[str, Any] | None:
    """Turns and tool calls of an answer, the share of answers that call a tool, and how often what failed; None where
    no environment answered."""
    if table.empty:
        return None
    return {
        "turns_mean": float(table.turns.mean()),
        "tool_calls_mean": float(table.calls.mean()),
        "tool_use_ratio": float((table.calls > 0).mean()),
        "failures": table.failures.explode().value_counts().sort_index().to_dict(),
    }


def _accuracy(right: pd.Series) -> dict[str, Any]:
    n, count = len(right), int(right.sum())
    return {"questions": n, "right": count, "accuracy": count / n, "interval": list(wilson_interval(count, n))}


def write_result(folder: Path, result: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Write the responses, then `result.json`: a folder that has it is complete.

    Raises:
        ConfigError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pa.Table.from_pylist(list(rows), ROW), folder / RESPONSES, compression="zstd")
        with whole_file(folder / RESULT) as path:
            path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {folder}: cannot be written ({error})") from error


def read_result(folder: str | Path) -> tuple[dict[str, Any], pd.Series]:
    """`result.json`, and whether each question, by its id, text and accepted answers, was answered right.

    Raises:
        ConfigError: the folder holds no complete result.
    """
    path = Path(folder).expanduser()
    if not (path / RESULT).is_file():
        inside = sorted(p.parent for p in path.glob(f"*/{RESULT}"))
        hint = f"; did you mean {inside[0]}?" if inside else ""
        raise ConfigError(f"{folder} holds no {RESULT}: give the folder that `rethinker eval` wrote{hint}")
    try:
        result = json.loads((path / RESULT).read_text(encoding="utf-8"))
        rows = parquet.read_table(path / RESPONSES, columns=["query_id", "question", "answers", "reward"]).to_pylist()
    except (ValueError, OSError, pa.ArrowException) as error:
        raise ConfigError(f"{folder}: damaged result ({one_line(error)})") from error
    verdicts = {(row["query_id"], row["question"], tuple(row["answers"])): row["reward"] >= 1.0 for row in rows}
    return result, pd.Series(verdicts.values(), index=pd.Index(verdicts, tupleize_cols=False))


def describe_result(result: dict[str, Any], folder: Path) -> str:
    """What the user reads: the accuracy and its parts as a table, and what qualifies them."""
    parts = result["by_category"] if len(result["by_category"]) > 1 else {}
    table = pd.DataFrame({"all": result} | {f"  {name}": entry for name, entry in parts.items()}).T
    table["accuracy"] = table.accuracy.map("{:.3f}".format)
    table["95% interval"] = ["{:.3f} to {:.3f}".format(*interval) for interval in table.interval]
    lines = [f"{result['title']}, mode {result['mode']}, {result['model']}"]
    lines.append(table[["questions", "right", "accuracy", "95% interval"]].to_string())
    if second := result["second_pass"]:
        lines.append(
            f"second pass on {second['answers']} answers: accuracy {second['first_accuracy']:.3f} -> "
            f"{result['accuracy']:.3f} ({second['wrong_to_right']} became right, {second['right_to_wrong']} wrong; "
            f"{second['no_room']} had no room for it)"
        )
    if talk := result["environment"]:
        failed = ", ".join(f"{reason} {count}" for reason, count in talk["failures"].items())
        lines.append(
            f"environment: {talk['turns_mean']:.2f} turns and {talk['tool_calls_mean']:.2f} tool calls per answer, "
            f"{talk['tool_use_ratio']:.0%} of the answers call a tool" + f"; failed: {failed}" * bool(failed)
        )
    covered = result["questions_in_benchmark"] + sum(result["uncovered"].values())
    if result["questions_published"] not in (None, covered):
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
