"""`make gpu`: every part's command works, nothing hides a failure, and a run is taken up where it ended."""

from __future__ import annotations

import json
import sys
import time

import pytest

from benchmarks import gpu, gpu_summary
from benchmarks.gpu_parts import PARTS, Part


def test_the_dry_run(tmp_path, capsys):
    """Every part's commands run at toy size, or have their arguments checked, and every part has a result."""
    assert gpu.main(["--dry-run", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for part in PARTS:
        record = json.loads((tmp_path / "dry_run" / f"{part.name}.json").read_text())
        assert record["status"] == "passed", record.get("output")
        assert record["machine"]["versions"]["torch"] and record["code"] == gpu.code() and record["dry_run"]
        only_arguments = ("training", "train_step_3b", "train_step_7b", "end_to_end", "vllm", "sanitizer", "ncu")
        assert ("no figures" in gpu_summary.line(part.name, record)) == (
            part.name in only_arguments and part.name != "sanitizer"
        )
        assert part.about in printed
    correct = json.loads((tmp_path / "dry_run" / "correctness.json").read_text())["result"]
    assert correct["fuzz"]["passed"] >= 10 and not correct["fuzz"]["failed"]
    assert set(correct["gpu_tests"]["skipped"].values()) == {"needs a CUDA device"}


@pytest.fixture
def suite(monkeypatch, tmp_path):
    """Runs `main` over parts given as {name: (shell command, options)} as on a GPU; returns (exit status, records)."""

    def run(parts: dict, *arguments: str):
        made = [
            Part(name, name, (f"bash -c '{command}'",), (), **{"seconds": 1, "limit": 30} | options)
            for name, (command, options) in parts.items()
        ]
        monkeypatch.setattr(gpu, "PARTS", tuple(made))
        monkeypatch.setattr(gpu_summary, "LINES", {name: lambda result: f"read {next(iter(result))}" for name in parts})
        monkeypatch.setattr(gpu, "machine", lambda: {"gpu": "NVIDIA Test", "commit": "abc"})
        status = gpu.main(["--out", str(tmp_path), *arguments])
        files = (tmp_path / "nvidia-test").glob("*.json")
        return status, {file.stem: json.loads(file.read_text()) for file in files}

    return run


def test_a_failure_stops_nothing_and_decides_the_status(suite, capsys):
    """The parts after a failed one run; only a part that checks correctness makes the exit status 1."""
    parts = {"a": ("echo why; exit 3", {}), "b": ("echo [1] > {out}/b.json", {"checks": True})}
    status, records = suite(parts)
    assert status == 0 and records["a"]["status"] == "failed" and records["a"]["exit_codes"] == [3]
    assert "why" in records["a"]["output"][0] and "why" in capsys.readouterr().out
    assert records["b"]["status"] == "passed" and records["b"]["result"] == {"b": [1]}
    status, _ = suite(parts | {"a": ("exit 3", {"checks": True})}, "--redo")
    assert status == 1 and "NOT CORRECT: a" in capsys.readouterr().out


def test_a_part_at_its_limit_is_killed_with_its_children(suite, tmp_path):
    """What a command started in the background ends with it, and what was written before is kept."""
    mark = tmp_path / "alive"
    command = f"echo [1] > {{out}}/early.json; (sleep 3; touch {mark}) & sleep 60"
    begin = time.monotonic()
    status, records = suite({"slow": (command, {"limit": 1, "checks": True})})
    assert status == 1 and time.monotonic() - begin < 10
    assert records["slow"]["status"] == "cut off" and records["slow"]["result"] == {"early": [1]}
    time.sleep(3)  # until it would have made its mark
    assert not mark.exists()


def test_results_of_this_code_are_not_measured_again(suite, tmp_path, capsys, monkeypatch):
    """A second run skips what has a result, finished or failed, but takes up what was cut off; --redo runs all."""
    count = tmp_path / "count"
    parts = {"done": (f"echo >> {count}", {}), "cut": (f"echo >> {count}; sleep 60", {"limit": 1})}
    suite(parts)
    suite(parts)
    assert len(count.read_text().splitlines()) == 3 and "(earlier)" in capsys.readouterr().out
    suite(parts, "--redo", "--parts", "done")
    assert len(count.read_text().splitlines()) == 4
    monkeypatch.setattr(gpu, "code", lambda: "other")
    suite(parts, "--parts", "done")
    assert len(count.read_text().splitlines()) == 5


def test_what_does_not_fit_or_is_missing_is_named(suite, capsys):
    """A part longer than what is left is left out and a shorter one still runs; a missing tool is a result."""
    parts = {
        "long": ("exit 1", {"seconds": 100, "checks": True}),
        "short": ("true", {}),
        "tool": ("true", {"needs": ("json", "no_such_tool"), "checks": True}),
    }
    status, records = suite(parts, "--minutes", "0.5")
    assert status == 0 and "long" not in records and records["short"]["status"] == "passed"
    assert records["tool"]["status"] == "missing" and records["tool"]["reason"] == "not installed: no_such_tool"
    assert "left out: takes about 100 s" in capsys.readouterr().out


def test_commands_side_by_side(suite, tmp_path, monkeypatch):
    """Commands that time nothing may run together; all of them must pass."""
    wait_for = "touch {out}/%s; for i in $(seq 100); do test -e {out}/%s && exit %d; sleep 0.1; done; exit 9"
    commands = tuple(f"bash -c '{wait_for % given}'" for given in (("a", "b", 0), ("b", "a", 5)))
    part = Part("both", "", commands, (), seconds=1, limit=20, side_by_side=True)
    assert gpu.run(part, 20, dry=False)["exit_codes"] == [0, 5]


def test_counters_and_tests_are_read(tmp_path):
    """ncu's lines among others, and pytest's outcomes with their reasons, without folders of this machine."""
    names, values = '"ID","Metric Name","Metric Unit","Metric Value"', '"0","dram__bytes_read.sum","Gbyte","1.71"'
    assert gpu.counters(f"==PROF== Connected\n{names}\n{values}\n") == {"dram__bytes_read.sum": "1.71 Gbyte"}
    file = tmp_path / "tests.xml"
    cases = [
        '<testcase classname="t" name="a"/>',
        f'<testcase classname="t" name="b"><failure message="at {gpu.ROOT}/x"/></testcase>',
        '<testcase classname="t" name="c"><skipped message="no tool"/></testcase>',
    ]
    file.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    found = gpu.tests(file)
    assert found["passed"] == 1 and found["skipped"] == {"t.c": "no tool"} and "./x" in found["failed"]["t.b"]
    assert gpu_summary._tests_line({"x": found}) == "1 passed, 1 failed, 1 skipped"


def test_files_with_gpu_tests_are_found():
    """By the marker, so that a new one is not forgotten."""
    assert {"tests/kernels/test_gpu.py", "tests/kernels/test_sum_tree_gpu.py"} <= set(gpu.gpu_tests())
    assert sys.executable and all(part.name in gpu_summary.LINES for part in PARTS)
