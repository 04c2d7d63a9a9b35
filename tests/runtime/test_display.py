"""The display: a line per step and validation, and a summary of what was learned."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from rethinker.runtime.display import Display, progress
from rethinker.samples import RunResult


def row(step: int, reward: float) -> dict:
    return {
        "step": step,
        "reward_mean": reward,
        "effective_query_ratio": 0.75,
        "replay_fraction": 0.25,
        "response_length_mean": 9.125,
        "loss": -0.01,
        "grad_norm": None,
        "tokens_per_s": 4321.0,
        "step_s": 1.5,
    }


def accuracy(overall: float, **by_category: float) -> SimpleNamespace:
    return SimpleNamespace(overall=overall, by_category=by_category, questions=512)


def finished(rewards: list[float], before=None, after=None) -> RunResult:
    metrics = [row(step, reward) for step, reward in enumerate(rewards, start=1)]
    return RunResult(Path("runs/x"), metrics, Path("runs/x/checkpoints/best"), before, after)


def test_a_line_per_step(capsys):
    """Every step is one line with its numbers; a missing metric is left out."""
    display = Display(10)
    display.step(row(1, 0.5))
    display.step(row(2, 0.6))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(
        "step 1/10  reward 0.500  effective 0.75  replay 0.25  length 9.1  loss -0.0100  tok/s 4,321"
    )


def test_silent_on_other_ranks(capsys):
    """A disabled display writes nothing at all."""
    display = Display(10, enabled=False)
    display.step(row(1, 0.5))
    display.validated(0, accuracy(0.5), "easy_vqa")
    display.summary(finished([0.5]))
    assert capsys.readouterr().out == ""


def test_validation_lines(capsys):
    """Validation names when, how many questions and each category, the first one also the data set."""
    display = Display(10)
    display.validated(0, accuracy(0.5, color=0.25, shape=0.75), "easy_vqa")
    display.validated(7, accuracy(0.75), "easy_vqa")
    shown = "greedy accuracy on data.validation=easy_vqa before training: 0.500 of 512 questions (color 0.250, shape "
    shown += "0.750)\n"
    shown += "greedy accuracy after step 7: 0.750 of 512 questions\n"
    assert capsys.readouterr().out == shown


def test_the_summary_says_what_was_learned(capsys):
    """Rewards of the first and last tenth, greedy accuracies and their change in points, and where the run lies."""
    before, after = accuracy(0.5, color=0.2, shape=0.8), accuracy(0.5625, color=0.3, shape=0.8)
    Display(20).summary(finished([0.3, 0.5, *[0.9] * 16, 0.6, 0.8], before, after))
    shown = capsys.readouterr().out
    assert "20 steps in 0:00:00" in shown
    assert "sampled reward   0.400 -> 0.700  (mean of the first and last 2 steps)" in shown
    assert "greedy accuracy  0.500 -> 0.562  (+6.2 points on 512 held-out questions)" in shown
    assert "runs/x/checkpoints/best" in shown and shown.rstrip().endswith("runs/x")


def test_the_summary_of_a_run_without_steps_or_validation(capsys):
    """A run that made no step, or had no held-out questions, still ends in a summary."""
    Display(0).summary(finished([]))
    Display(1).summary(finished([0.5]))
    shown = capsys.readouterr().out
    assert "0 steps" in shown and "sampled reward   0.500 -> 0.500  (first and last step)" in shown
    assert "greedy" not in shown


def test_progress_passes_everything_on(capsys):
    """Progress yields the items unchanged and shows how far it is."""
    assert list(progress(range(50), "warm-up")) == list(range(50))
    assert list(progress(iter([7]), "one", total=1)) == [7]
    assert list(progress([], "none")) == []
    shown = capsys.readouterr().out
    assert "warm-up: 100%" in shown and "one: 100%" in shown
