"""Results on the same questions are compared pair by pair; others fail, naming the difference."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rethinker.config import ConfigError
from rethinker.evaluation.compare import compare_results, describe_comparison
from rethinker.evaluation.intervals import mcnemar, paired_difference, wilson_interval
from rethinker.evaluation.results import (
    answered,
    conversed,
    describe_result,
    read_result,
    summarize,
    unanswered,
    write_result,
)
from rethinker.samples import Completion, Observed, Query


def queries(n: int = 10) -> list[Query]:
    return [Query(f"q{i}", f"What is {i}?", str(i), metadata={"category": "even odd".split()[i % 2]}) for i in range(n)]


def write(folder: Path, rights: list[bool], asked: list[Query] | None = None, **fields) -> str:
    """A result whose answers are right or not, as given."""
    asked = asked or queries(len(rights))
    said = Completion([5, 6], [-1.0, -1.0], "so", "stop")
    rows = [answered(unanswered(q, None), said, float(right)) for q, right in zip(asked, rights, strict=True)]
    result = {
        **{"benchmark": "mine", "title": "Mine", "model": str(folder), "mode": "normal"},
        **summarize(rows),
        **{"failed_checks": {}, "uncovered": {}, "questions_in_benchmark": len(asked), "questions_published": 12},
        **{"settings": {"data.prompt": "{question}", "rollout.max_new_tokens": 2}},
    }
    write_result(folder, result | fields, rows)
    return str(folder)


def test_what_is_written_is_read_back(tmp_path):
    """Accuracy, interval and categories in result.json; every response with its tokens in the parquet file."""
    import pyarrow.parquet as parquet

    folder = write(tmp_path / "a", [True] * 7 + [False] * 3)
    result, verdicts = read_result(folder)
    assert result["accuracy"] == 0.7 and result["interval"] == list(wilson_interval(7, 10))
    assert result["by_category"]["even"]["right"] == 4 and result["by_category"]["odd"]["questions"] == 5
    assert verdicts.index[3] == ("q3", "What is 3?", ("3",)) and list(verdicts) == [True] * 7 + [False] * 3
    row = parquet.read_table(tmp_path / "a/responses.parquet").to_pylist()[0]
    assert row["response"] == "so" and row["token_ids"] == [5, 6] and row["category"] == "even"
    text = describe_result(result, tmp_path / "a")
    assert re.search(r"\nall +10 +7 +0.700 +0.397 to 0.892\n  even +5 +4 +0.800", text)
    assert "note: the published benchmark has 12 questions" in text


def test_comparison(tmp_path):
    """Pairs are matched by question, whatever the files' order; the first result is the base of all others."""
    a = write(tmp_path / "a", [True] * 5 + [False] * 5)
    order = [*range(9, -1, -1)]
    b = write(tmp_path / "b", [i in (0, 1, 2, 5, 6, 7, 8) for i in order], [queries()[i] for i in order])
    c = write(tmp_path / "c", [True] * 5 + [False] * 5, settings={"data.prompt": "other"})
    base, second, third = compare_results([a, b, c])
    assert "difference" not in base
    assert (second["only_first"], second["only_this"]) == (2, 4) and second["difference"] == 0.7 - 0.5
    assert (second["difference"], *second["difference_interval"]) == paired_difference(3, 2, 4, 1)
    assert second["p_value"] == mcnemar(2, 4) and third["p_value"] == 1.0 and third["difference"] == 0.0
    text = describe_comparison([base, second, third])
    assert "+0.200" in text and "0.69" in text
    assert "note: data.prompt differs" in text and "rollout.max_new_tokens differs" in text


def test_tool_use_is_told(tmp_path):
    """Where an environment answered: turns and calls per answer, the share that calls, and what failed; two results
    differ in it by one line, or where both have one by what shapes its answers."""
    said = [
        Completion([5, 6], [-1.0, -1.0], "so", "stop", observed=(Observed(1, 2, 1, calls=2, failures=("box", "box")),)),
        Completion([5, 6], [-1.0, -1.0], "so", "stop"),
    ]
    rows = [
        answered(unanswered(query, None), one, 1.0) | conversed(one)
        for query, one in zip(queries(2), said, strict=True)
    ]
    shaped = {"environment.use": ["crop"], "environment.max_turns": 4}
    plain = write(tmp_path / "a", [True] * 2)
    tools = write(tmp_path / "b", [True] * 2, **summarize(rows), settings=shaped)
    more = write(tmp_path / "c", [True] * 2, **summarize(rows), settings=shaped | {"environment.max_turns": 8})
    line = "environment: 1.00 turns and 1.00 tool calls per answer, 50% of the answers call a tool; failed: box 2"
    assert line in describe_result(read_result(tools)[0], tmp_path)
    assert "environment" not in describe_result(read_result(plain)[0], tmp_path)
    told = describe_comparison(compare_results([plain, tools]))
    assert "note: environment.use differs" in told and "environment.max_turns" not in told
    both = describe_comparison(compare_results([tools, more]))
    assert "note: environment.max_turns differs" in both and "environment.use" not in both


def test_different_questions_are_refused(tmp_path):
    """Fewer questions, another text, another answer, another benchmark, no result: the error names which."""
    a = write(tmp_path / "a", [True] * 10)
    fewer = write(tmp_path / "b", [True] * 8)
    message = "10 questions.*8.*different questions: one of both lacks 'q8'.*--benchmark and --limit"
    with pytest.raises(ConfigError, match=message):
        compare_results([a, fewer])
    changed = [*queries(9), Query("q9", "What is 9?", "nine")]
    with pytest.raises(ConfigError, match="'q9', or has it with another text or answer"):
        compare_results([a, write(tmp_path / "c", [True] * 10, changed)])
    with pytest.raises(ConfigError, match="is on mine and .* on other"):
        compare_results([a, write(tmp_path / "d", [True] * 10, benchmark="other")])
    with pytest.raises(ConfigError, match=r"holds no result.json.*did you mean .*/a\?"):
        compare_results([a, tmp_path])
    with pytest.raises(ConfigError, match="at least two"):
        compare_results([a])
    (tmp_path / "b/responses.parquet").write_bytes(b"x")
    with pytest.raises(ConfigError, match="damaged result"):
        compare_results([a, fewer])


def test_a_result_is_whole_or_not_there(tmp_path, monkeypatch):
    """result.json comes last: a folder that has it is complete."""
    monkeypatch.setattr("pyarrow.parquet.write_table", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(ConfigError, match="cannot be written .*disk full"):
        write(tmp_path / "a", [True])
    assert not (tmp_path / "a/result.json").exists()
    monkeypatch.undo()
    assert json.loads((Path(write(tmp_path / "a", [True])) / "result.json").read_text())["right"] == 1
