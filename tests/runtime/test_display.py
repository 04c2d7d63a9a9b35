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
        "fast_ratio": 0.45,
        "rethink_ratio": 0.0625,
        "entropy": None,
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
    display.step(row(3, 0.6) | {"turns_mean": 2.5, "tool_use_ratio": 0.75, "environment_failures": {"box": 0.5}})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "length 9.1  rethink 0.06  tools 0.75  tok/s" in lines[2]
    assert lines[0].startswith(
        "step 1/10  reward 0.500  effective 0.75  replay 0.25  length 9.1  fast 0.45  rethink 0.06  tok/s 4,321"
    )


def test_a_line_fits_a_terminal(capsys):
    """With every number at its longest a line has at most 160 characters, and so has the one after a validation."""
    display = Display(1000)
    long = {
        "response_length_mean": 1234.5,
        "tool_use_ratio": 0.85,
        "entropy": 1.234,
        "tokens_per_s": 123456.0,
        "step_s": 123.45,
    }
    long |= {"replay_by_category": {f"{n} terms": n / 35 for n in range(2, 9)}, "trained_pairs": 512}
    display.step(row(1000, 0.5) | long)
    display.validated(1000, accuracy(0.5), "sums", [row(1000, 0.5) | long])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and max(map(len, lines)) <= 160
    assert "entropy 1.234" in lines[0] and "8 terms 23%" in lines[2] and "2 terms" not in lines[2]


def test_a_validation_says_how_the_model_answered_since_the_last(capsys):
    """Shares of fast, slow and rethinking answers as means over the steps, replay's draws weighted by their number."""
    steps = [row(1, 0.5), row(2, 0.5) | {"fast_ratio": 0.25, "rethink_ratio": 0.1875, "replay_fraction": 0.75}]
    draws = ({"2 terms": 1.0}, {"2 terms": 0.5, "6 terms": 0.5})
    steps = [step | {"replay_by_category": drawn, "trained_pairs": 8} for step, drawn in zip(steps, draws, strict=True)]
    display = Display(10)
    display.validated(2, accuracy(0.5), "sums", steps)
    display.validated(2, accuracy(0.5), "sums", [step | {"replay_by_category": {}} for step in steps])
    display.validated(2, accuracy(0.5), "sums", [{"step": 1, "val_accuracy": None}])  # of an older release
    first, second, *_ = shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    kinds = "  since the last one: answers 35% fast, 52% slow, 12% rethinking"
    assert shown == [first, second] and second == kinds
    assert first == f"{kinds}; replay drew 2 terms 62%, 6 terms 38%"


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


def test_a_stopped_run_says_how_to_go_on(capsys):
    """On as many ranks as before: on others it would be the same to rounding only."""
    Display(10).stopped("SIGTERM", 6, Path("runs/a"), ranks=1)
    Display(10).stopped("SIGTERM", 6, Path("runs/a"), ranks=2)
    alone, both = (line.strip() for line in capsys.readouterr().out.splitlines() if "--resume" in line)
    assert alone == "rethinker train runs/a/config.yaml --resume auto"
    assert both == "torchrun --nproc-per-node 2 -m rethinker train runs/a/config.yaml --resume auto"
