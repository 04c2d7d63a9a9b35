"""Figures show the run's own numbers, at their own steps."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rethinker import cli
from rethinker.report import learning

REWARDS = [0.40, 0.44, 0.52, 0.48, 0.60]


def write_run(folder, rewards, accuracies=None, torn=""):
    """A run whose step i (from 1) sampled rewards[i - 1], with accuracies by step."""
    accuracies = accuracies or {}
    rows = [{"step": 0, "val_accuracy": accuracies[0]}] if 0 in accuracies else []
    rows += [
        {
            "step": step,
            "reward_mean": reward,
            "effective_query_ratio": 1 - step / 10,
            "replay_fraction": step / 10,
            "val_accuracy": accuracies.get(step),
        }
        for step, reward in enumerate(rewards, start=1)
    ]
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)
    return folder


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws the learning curve of some runs; returns its two panels."""

    def draw(*folders):
        kept = []
        monkeypatch.setattr(learning, "save_figure", lambda figure, output: kept.append(figure) or output)
        learning.learning_curve(folders, tmp_path / "learning.svg")
        return kept[0].axes

    return draw


def lines(axes):
    """The labelled lines of a panel: label -> (x, y)."""
    return {line.get_label(): line.get_data() for line in axes.get_lines() if not line.get_label().startswith("_")}


def test_one_run_is_drawn_at_its_own_steps(drawn, tmp_path):
    """Rewards and shares stand at steps 1..n; accuracies where they were measured, step 0 included."""
    above, below = drawn(write_run(tmp_path / "run", REWARDS, {0: 0.5, 2: 0.55, 5: 0.65}))
    upper, lower = lines(above), lines(below)
    np.testing.assert_allclose(upper["sampled reward"], [[1, 2, 3, 4, 5], REWARDS])
    np.testing.assert_allclose(upper["greedy held-out accuracy, 0.500 to 0.650"], [[0, 2, 5], [0.5, 0.55, 0.65]])
    np.testing.assert_allclose(lower["queries with an advantage"][1], [0.9, 0.8, 0.7, 0.6, 0.5])
    np.testing.assert_allclose(lower["pairs from replay"][1], [0.1, 0.2, 0.3, 0.4, 0.5])


def test_stages_are_one_curve(drawn, tmp_path):
    """A run that goes on from another's checkpoint is drawn behind it, with a line at the join."""
    write_run(tmp_path / "first", REWARDS, {0: 0.5, 5: 0.6})
    (tmp_path / "first" / "config.yaml").write_text("{}")
    second = write_run(tmp_path / "second", [0.7, 0.8], {2: 0.9})
    (second / "config.yaml").write_text(f"policy:\n  model: {tmp_path}/first/checkpoints/best\n")
    above, below = drawn(second)
    np.testing.assert_allclose(lines(above)["sampled reward"], [[1, 2, 3, 4, 5, 6, 7], [*REWARDS, 0.7, 0.8]])
    np.testing.assert_allclose(lines(above)["greedy held-out accuracy, 0.500 to 0.900"], [[0, 5, 7], [0.5, 0.6, 0.9]])
    assert all([5, 5] in [list(line.get_xdata()) for line in axes.get_lines()] for axes in (above, below))


def test_long_runs_are_smoothed_without_shifting(drawn, tmp_path):
    """The average is centred: of a straight line it is the line, away from the ends; the single steps stay visible."""
    rewards = [step / 60 for step in range(60)]
    above, _ = drawn(write_run(tmp_path / "run", rewards))
    smooth = lines(above)["sampled reward, mean of 7 steps"][1]
    np.testing.assert_allclose(smooth[3:-3], rewards[3:-3])
    np.testing.assert_allclose(above.get_lines()[0].get_ydata(), rewards)


def test_seeds_are_drawn_as_mean_and_range(drawn, tmp_path):
    """Several runs: their mean, in a band from the lowest to the highest, over the steps all of them have."""
    first = write_run(tmp_path / "a", [0.2, 0.4, 0.6], {0: 0.5, 3: 0.7})
    second = write_run(tmp_path / "b", [0.4, 0.8, 0.6, 0.9], {0: 0.5, 3: 0.8, 4: 0.9})
    above, _ = drawn(first, second)
    np.testing.assert_allclose(lines(above)["sampled reward"], [[1, 2, 3], [0.3, 0.6, 0.6]])
    np.testing.assert_allclose(lines(above)["greedy held-out accuracy, 0.500 to 0.750"], [[0, 3], [0.5, 0.75]])
    rewards, accuracies = (band.get_paths()[0].vertices[:, 1] for band in above.collections)
    assert (rewards.min(), rewards.max()) == pytest.approx((0.2, 0.8))
    assert (accuracies.min(), accuracies.max()) == pytest.approx((0.5, 0.8))


def test_missing_numbers_are_left_out(drawn, tmp_path):
    """A null reward (a non-finite number), a run without validation and a half-written last line are no obstacle."""
    above, _ = drawn(write_run(tmp_path / "run", [0.2, None, 0.6], torn='{"step": 4, "rew'))
    assert list(lines(above)) == ["sampled reward"]
    np.testing.assert_allclose(lines(above)["sampled reward"], [[1, 3], [0.2, 0.6]])


@pytest.mark.parametrize(("suffix", "begins"), [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_files_are_written_and_repeatable(tmp_path, suffix, begins):
    """The suffix chooses the format, and the same metrics give the same bytes."""
    run = write_run(tmp_path / "run", REWARDS, {0: 0.5, 5: 0.6})
    files = [learning.learning_curve([run], tmp_path / f"{name}.{suffix}") for name in ("once", "again")]
    assert files[0].read_bytes().startswith(begins)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_command_draws_it(tmp_path, monkeypatch, capsys):
    """`rethinker report RUN... --output FILE.svg` is the curve alone; a folder that is no run is one line."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", REWARDS)
    write_run(tmp_path / "unborn", [], {0: 0.5})
    assert cli.main(["report", "run", "--output", "learning.svg"]) == 0
    assert (tmp_path / "learning.svg").read_bytes().startswith(b"<?xml")
    assert cli.main(["report", "run", "unborn", "--output", "other.svg"]) == 2
    assert "no step" in capsys.readouterr().err and not (tmp_path / "other.svg").exists()
