"""The kernel benchmark: it runs without a GPU, says so, and notices a provider that computes something else."""

from __future__ import annotations

import json

import pytest

from benchmarks import kernels


def test_a_run_without_a_gpu(tmp_path, monkeypatch, capsys):
    """Each op gets an entry with its spread and a chart; peers that cannot run are named with their reason."""
    monkeypatch.setattr(kernels, "SMALL", (256, 8, 64))
    monkeypatch.setattr(
        "sys.argv", ["kernels", "linear_grpo_loss", "grpo_loss", "--repeats", "2", "--out", str(tmp_path)]
    )
    monkeypatch.setattr(kernels.torch.cuda, "is_available", lambda: False)
    kernels.main()
    assert "No CUDA device" in capsys.readouterr().out
    report = json.loads((tmp_path / "cpu" / "kernels.json").read_text())
    by_op = {result["op"]: result["providers"] for result in report["results"]}
    assert list(by_op) == ["linear_grpo_loss", "grpo_loss"] and report["machine"]["cores"] >= 1
    for providers in by_op.values():
        low, high = providers["rethinker"]["quartiles_ms"]
        assert 0 < low <= providers["rethinker"]["median_ms"] <= high
    for provider in by_op["linear_grpo_loss"].values():
        assert "skipped" in provider or "failed" in provider or provider["gradient_error"] < 1e-5
    assert {file.name for file in (tmp_path / "cpu").glob("*.svg")} == {
        "kernels_linear_grpo_loss.svg",
        "kernels_grpo_loss.svg",
    }


def test_a_wrong_gradient_is_noticed():
    """A provider whose loss is off by a tenth has a large gradient error."""
    inputs = kernels.head_inputs(256, 8, 64, "cpu")
    right = kernels.grpo_of(kernels.ours)
    for wrong, least in ((lambda given: right(given), 0), (lambda given: 1.1 * right(given), 0.05)):
        inputs["hidden"].grad = inputs["weight"].grad = None
        wrong(inputs).backward()
        error = kernels.gradient_error(inputs, "rethinker")
        assert error > least if least else error < 1e-5


def test_hardly_a_row_is_clipped():
    """The inputs give every provider its full work: rows without a gradient would be skipped."""
    inputs = kernels.head_inputs(1024, 32, 256, "cpu")
    _, _, stats = kernels.ours.linear_grpo_loss(**inputs, normalizer=1.0)
    named = dict(zip(kernels.ours.LINEAR_GRPO_STATS, stats.tolist(), strict=True))
    assert named["tokens"] == 1024 and named["clipped_low"] + named["clipped_high"] == 0


@pytest.mark.parametrize("op", sorted(kernels.OPS.keys() - {"group_advantages"}))  # which is plain PyTorch itself
def test_every_op_has_the_definition_beside_it(op):
    """The baseline of each op is the tests' own reference."""
    assert {"rethinker", "pytorch"} <= set(kernels.OPS[op]["providers"])
