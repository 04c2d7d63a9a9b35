"""The replay benchmark measures what it says, of every method alike, and names what it could not measure."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys

import pytest
import torch

from benchmarks import replay, samplers
from tests.kernels.sum_trees import require_compiler


def run(monkeypatch, tmp_path, *arguments: str) -> dict:
    """The report of `python -m benchmarks.replay`."""
    monkeypatch.setattr(sys, "argv", ["replay", "--out", str(tmp_path), *arguments])
    replay.main()
    (report,) = tmp_path.glob("*/replay.json")
    assert report.with_suffix(".svg").read_text().startswith("<?xml")
    return json.loads(report.read_text())


def test_the_report_has_every_operation_and_names_missing_peers(monkeypatch, tmp_path):
    """Median within the quartiles for every operation and size; a peer that is not there is skipped with the reason."""
    require_compiler()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchrl" else find(name))
    monkeypatch.setitem(sys.modules, "sumtree", None)
    threads = torch.get_num_threads()
    report = run(monkeypatch, tmp_path, "--sizes", "1000", "3000", "--capacity", "700", "--repeats", "5")
    assert torch.get_num_threads() == threads
    results = report["results"]
    assert set(results) == set(samplers.METHODS) and report["machine"]["cpu"]
    for name in ("torchrl SumSegmentTree", "sumtree"):
        assert list(results.pop(name)) == ["skipped"]
    for result in results.values():
        assert set(result["sizes"]) == {"1000", "3000"}
        for operations in result["sizes"].values():
            assert {"update", "sample"} <= set(operations) and set(operations) == set(result["growth"])
            for measured in operations.values():
                low, high = measured["quartiles_us"]
                assert 0 < low <= measured["median_us"] <= high and measured["repeats"] == 5
    buffer = report["buffer"]
    assert buffer["capacity"] == 700 and set(buffer["rules"]) == set(replay.RULES)
    for operations in buffer["rules"].values():
        assert all(operations[name]["repeats"] == 5 and operations[name]["median_us"] > 0 for name in ("add", "draw"))
    relative = report["sample_time_relative_to_ours"]["3000"]
    assert relative["rethinker C++"] == 1 and set(relative) == set(results)


@pytest.mark.parametrize("name", ["rethinker C++", "torch.multinomial", "cumsum + searchsorted"])
def test_methods_draw_what_was_updated(name):
    """Each method draws 512 slots, and after an update only those that kept a weight."""
    require_compiler()
    method = samplers.METHODS[name](torch.ones(1000, dtype=torch.float64))
    method["update"](torch.arange(999), torch.zeros(999, dtype=torch.float64))
    assert method["sample"]().tolist() == [999] * samplers.BATCH


def test_every_method_gets_the_same_inputs():
    """Two methods see the same slots and priorities, in range and different each time."""
    first, second = (list(itertools.islice(replay.inputs(700), 3)) for _ in range(2))
    for (a, p), (b, q) in zip(first, second, strict=True):
        assert torch.equal(a, b) and torch.equal(p, q) and len(a) == samplers.BATCH and a.max() < 700
    assert not torch.equal(first[0][0], first[1][0])


def test_growth_is_the_exponent():
    """Time proportional to N^0.5 gives 0.5; sizes at which a method failed do not count."""
    results = {str(n): {"sample": {"median_us": n**0.5}} for n in (100, 1000, 10_000)} | {"1000000": {"failed": "x"}}
    assert replay.growth(results) == pytest.approx({"sample": 0.5})
    assert replay.growth({"100": results["100"]}) == {}
