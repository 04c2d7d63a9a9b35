"""Phases add up wall time; chosen steps leave a trace that a viewer can open."""

from __future__ import annotations

import json
import time

import pytest
import torch

from rethinker.runtime.profiling import StepProfiler, phase


def test_phases_add_up():
    """A phase entered twice counts both times, also when it ends in an error."""
    times: dict[str, float] = {}
    for _ in range(2):
        with phase("rollout", times):
            time.sleep(0.02)
    with pytest.raises(KeyError), phase("train", times):
        time.sleep(0.02)
        raise KeyError
    with phase("unmeasured"):
        pass
    assert set(times) == {"time_rollout_s", "time_train_s"}
    assert 0.04 <= times["time_rollout_s"] < 0.2
    assert times["time_train_s"] >= 0.02


def run_steps(spec, folder, last):
    profiler = StepProfiler(spec, folder)
    for step in range(1, last + 1):
        with profiler.step(step):
            torch.full((step, step), 1.0) @ torch.ones(step, 1)
    profiler.close()


def matmuls(file):
    events = json.loads(file.read_text())["traceEvents"]
    shapes = [e["args"]["Input Dims"][0] for e in events if e.get("name") == "aten::mm"]
    return [shape[0] for shape in shapes]


def test_the_trace_holds_the_chosen_steps(tmp_path):
    """Steps 3 and 4, and no other, are in the trace; a run that ends inside the range still writes it."""
    run_steps("3:5", tmp_path, last=7)
    assert matmuls(tmp_path / "trace_steps_3_5.json") == [3, 4]
    run_steps("3:9", tmp_path, last=3)
    assert matmuls(tmp_path / "trace_steps_3_9.json") == [3]


def test_no_steps_no_trace(tmp_path):
    """Without profile.steps nothing is written."""
    run_steps(None, tmp_path, last=2)
    assert list(tmp_path.iterdir()) == []
