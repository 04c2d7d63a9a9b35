"""The ablation's arithmetic and its memory of finished runs."""

from __future__ import annotations

import json
import math
import subprocess

import pytest

from benchmarks import ablation

FULL, SSR, *_ = ablation.METHODS


def result(method: str, seed: int, accuracy: float) -> dict:
    return {"task": "easy_vqa", "method": method, "seed": seed, "accuracy": accuracy} | dict.fromkeys(
        ablation.AVERAGED, 0.5
    )


def test_differences_are_paired_by_seed():
    """A constant gap between methods has an interval of width 0, however much the seeds differ."""
    results = [result(FULL, s, a) for s, a in enumerate((0.5, 0.7, 0.9))]
    results += [result(SSR, s, a - 0.1) for s, a in enumerate((0.5, 0.7, 0.9))]
    full, ssr = ablation.summarise(results)
    assert full["accuracy"] == pytest.approx(0.7) and full["difference_from_full"] is None
    assert full["accuracy_95"] == pytest.approx(4.303 * 0.2 / math.sqrt(3), rel=1e-3)
    assert (ssr["difference_from_full"], ssr["difference_95"]) == (pytest.approx(-0.1), pytest.approx(0, abs=1e-9))
    lines = ablation.table([full, ssr]).splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1 and "-0.100 ± 0.000" in lines[3]


def test_a_finished_run_is_not_run_again(tmp_path, monkeypatch):
    """What a run left is read; an interrupted one, without a result, starts anew."""
    commands = []

    def trained(command, **_):
        commands.append(command)
        folder = tmp_path / command[command.index("--run.name") + 1]
        folder.mkdir()  # fails if the interrupted run's folder were still there
        metrics = "reward_mean effective_query_ratio rethink_ratio rethink_kept rethink_fixed rethink_broken "
        row = dict.fromkeys((metrics + "trained_pairs advantage_abs_mean step_s").split(), 0.25)
        rows = [row | {"step": step, "generated_tokens": 10 * step} for step in (1, 2)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        validations = [{"val_accuracy": a, "by_category": {}, "questions": 8} for a in (0.5, 0.75)]
        (folder / "validation.jsonl").write_text("".join(json.dumps(v) + "\n" for v in validations))

    monkeypatch.setattr(subprocess, "run", trained)
    (tmp_path / "easy_vqa-0-7-1000").mkdir()
    (tmp_path / "easy_vqa-0-7-1000" / "metrics.jsonl").write_text("half a li")
    first = ablation.run("easy_vqa", FULL, 7, 1000, tmp_path, None)
    assert (first["accuracy_before"], first["accuracy"], first["steps"], first["generated_tokens"]) == (
        0.5,
        0.75,
        2,
        20,
    )
    assert ablation.run("easy_vqa", FULL, 7, 1000, tmp_path, None) == first and len(commands) == 1
    assert ablation.run("easy_vqa", SSR, 7, 1000, tmp_path, None)["method"] == SSR and len(commands) == 2
    assert "--rethink.fraction" in commands[0] and "--rethink.fraction" not in commands[1]
    assert commands[0][commands[0].index("--train.max_generated_tokens") + 1] == "1000"
