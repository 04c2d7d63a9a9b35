"""Figures show the runs' own numbers, labelled by algorithm, and are not drawn where there is nothing to show."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from rethinker.algorithm.selection import ADVANTAGE_BINS
from rethinker.config import ConfigError
from rethinker.report import figures
from rethinker.report.drawing import new_figure, save_figure
from rethinker.report.page import write_report
from rethinker.report.rethinking import compare, read_evaluations, rethinking_analysis
from rethinker.report.runs import all_stages, read_runs
from rethinker.report.story import STORY
from rethinker.runtime.profiling import PHASES
from tests.report.examples import HISTOGRAMS, write_evaluation, write_run, write_stages

ALGORITHMS = ("grpo", "filter", "ssr")


@pytest.fixture
def three(tmp_path):
    """A run of each algorithm, with validations."""
    accuracies = {"grpo": {0: 0.5, 6: 0.6}, "filter": {0: 0.5, 6: 0.65}, "ssr": {0: 0.5, 3: 0.6, 6: 0.7}}
    return read_runs([write_run(tmp_path / f"run_{a}", a, accuracies=accuracies[a]) for a in ALGORITHMS])


def draw(name, runs):
    """The figure of this name on a page about these runs."""
    (figure,) = [figure for figure in (*STORY, *figures.FIGURES) if figure.name == name and figure.suits(runs)]
    return figure.drawn(runs)


def lines(axes):
    """The labelled lines of a panel: label -> (x, y)."""
    return {line.get_label(): line.get_data() for line in axes.get_lines() if not line.get_label().startswith("_")}


def heights(axes):
    """Bars by label: label -> heights."""
    return {bars.get_label(): [bar.get_height() for bar in bars] for bars in axes.containers}


def test_algorithms_are_drawn_side_by_side(three):
    """Accuracy and effective queries: one line per run, named by its algorithm, at the run's own steps."""
    (axes,) = draw("validation", three).axes
    assert list(lines(axes)) == list(ALGORITHMS)
    np.testing.assert_allclose(lines(axes)["ssr"], [[0, 3, 6], [0.5, 0.6, 0.7]])
    (axes,) = draw("effective_queries", three).axes
    np.testing.assert_allclose(lines(axes)["grpo"], [[1, 2, 3, 4, 5, 6], [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]])
    colors = [line.get_color() for line in axes.get_lines()]
    assert len(set(colors)) == 3


def test_labels_tell_runs_apart(tmp_path):
    """The algorithm where it suffices, else the name, else the folder; a run given twice is drawn once."""
    one = write_run(tmp_path / "one", "ssr")
    two = write_run(tmp_path / "two", "ssr")
    again = write_run(tmp_path / "seeds" / "one", "ssr")
    other = write_run(tmp_path / "other", "grpo")
    assert [run.label for run in read_runs([one, other, one])] == ["ssr", "grpo"]
    assert [run.label for run in read_runs([one, two, other])] == ["one", "two", "other"]
    assert [run.label for run in read_runs([one, again])] == [str(one), str(again)]


def test_advantages_are_counted_over_all_steps(three):
    """The histogram's bars are each run's shares of trained pairs, in per cent; they have the trainer's bins."""
    (axes,) = draw("advantages", three).axes
    for algorithm in ALGORITHMS:
        counts = 6 * np.array(HISTOGRAMS[algorithm]) * [1, 1, 3.5, 1, 1, 1]  # examples: bin 2 grows with the step
        np.testing.assert_allclose(heights(axes)[algorithm], 100 * counts / counts.sum())
    assert len(figures.ADVANTAGES) == len(ADVANTAGE_BINS) - 1
    for words, edge in zip(figures.ADVANTAGES[1:-1], ADVANTAGE_BINS[2:-1], strict=True):
        assert words.endswith(f"to {edge:g}")


def test_times_add_up_to_the_step(three):
    """Phases and the rest stack to step_s, as means over each run; every phase that the trainer logs is one of its
    own."""
    (axes,) = draw("time", three).axes
    widths = {bars.get_label(): [bar.get_width() for bar in bars] for bars in axes.containers}
    assert list(widths) == [*PHASES, "other"]
    np.testing.assert_allclose(widths["rollout"], [1.0] * 3)
    np.testing.assert_allclose(widths["rethink"], [0.3] * 3)
    np.testing.assert_allclose(widths["checkpoint"], [0.1] * 3)
    np.testing.assert_allclose(np.sum(list(widths.values()), axis=0), [4.0] * 3)


def test_replay_is_of_the_runs_that_replay(three):
    """Fraction, size and age of ssr's buffer, in ssr's colour of other figures; without ssr no such figure."""
    share, size, age = draw("replay", three).axes
    assert list(lines(share)) == ["ssr"]
    np.testing.assert_allclose(lines(share)["ssr"][1], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    np.testing.assert_allclose(lines(size)["ssr"][1], [50, 100, 150, 200, 250, 300])
    np.testing.assert_allclose(lines(age)["ssr"][1], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    colors = {line.get_label(): line.get_color() for line in draw("effective_queries", three).axes[0].get_lines()}
    assert share.get_lines()[0].get_color() == colors["ssr"]
    assert draw("replay", three[:2]) is None


def test_refill_is_of_the_runs_that_refill(three, tmp_path):
    """Share and number of the sampled queries; without refill no such figure."""
    assert draw("refill", three) is None
    counts = {"refill_rounds": 2, "sampled_queries": 40, "sampled_effective_ratio": 0.25}
    share, number = draw("refill", read_runs([write_run(tmp_path / "dapo", "grpo", **counts)])).axes
    assert [y[0] for axes in (share, number) for _, y in lines(axes).values()] == [0.25, 40]


def test_lengths_and_policy_metrics(three):
    """Response length with the rethinking ratio below; entropy, clipping, KL, mismatch, gradient norm and loss."""
    length, rethinking = draw("response_length", three).axes
    np.testing.assert_allclose(lines(length)["filter"][1], [21, 22, 23, 24, 25, 26])
    np.testing.assert_allclose(lines(rethinking)["filter"][1], np.arange(1, 7) * 0.02)
    panels = {axes.get_title(loc="left"): lines(axes) for axes in draw("policy", three).axes}
    np.testing.assert_allclose(panels["entropy (nats)"]["grpo"][1], 1 / np.arange(1, 7))
    np.testing.assert_allclose(panels["clipped tokens, above"]["grpo"][1], [0.02] * 6)
    np.testing.assert_allclose(panels["clipped tokens, below"]["grpo"][1], [0.01] * 6)
    assert "KL to reference" not in panels and len(panels) == 7


def joins(axes):
    """Steps of the thin lines where later stages begin."""
    return [line.get_xdata()[0] for line in axes.get_lines() if list(line.get_ydata()) == [0, 1]]


def test_a_page_shows_each_fact_once(three):
    """Of one run the story has accuracy, length and effective queries; several runs are compared as before, without."""
    named = {n: [f.name for f in (*STORY, *figures.FIGURES) if f.suits(three[:n])] for n in (1, 3)}
    assert all(len(names) == len(set(names)) for names in named.values())
    assert set(named[1]) - set(named[3]) == {"kinds", "replay_categories"} and set(named[3]) < set(named[1])
    assert not [figure for figure in STORY if figure.suits(three)]
    titles = [axes.get_title(loc="left") for axes in draw("replay", three[2:]).axes]
    assert titles == ["samples in the buffer", "age of draws (steps)"]  # the share is in the story


def test_kinds_of_answers_are_stacked(three):
    """Fast, slow and rethinking responses fill 100 per cent at every step, each with its own share."""
    (axes,) = draw("kinds", three[2:]).axes
    edges = {}
    for area in axes.collections:
        points = area.get_paths()[0].vertices
        edges[area.get_label()] = [sorted({round(y) for x, y in points if x == step})[-1] for step in (1, 6)]
    assert edges == {"fast": [55, 30], "slow": [98, 88], "rethinking": [100, 100]}
    bare = [replace(three[2], steps=[{k: v for k, v in row.items() if k != "fast_ratio"} for row in three[2].steps])]
    assert draw("kinds", bare) is None  # of an older release


def test_accuracy_by_category(three):
    """One line per category at its own steps, and overall the boldest; at most 8 categories, one alone adds none."""
    (run,) = three[2:]
    (axes,) = draw("validation", [run]).axes
    assert list(lines(axes)) == ["color", "yes/no", "overall"]
    np.testing.assert_allclose(lines(axes)["color"], [[0, 3, 6], [0.25, 0.3, 0.35]])
    np.testing.assert_allclose(lines(axes)["overall"], [[0, 3, 6], [0.5, 0.6, 0.7]])
    widths = {line.get_label(): line.get_linewidth() for line in axes.get_lines()}
    assert widths["overall"] > 1.5 * widths["color"]
    for count, drawn in ((1, 1), (8, 9), (20, 9)):
        by_category = {f"c{n:02d}": 0.5 for n in range(count)}
        many = replace(run, validations=[row | {"by_category": by_category} for row in run.validations])
        assert len(lines(draw("validation", [many]).axes[0])) == drawn


def test_a_category_of_any_name_leaves_room_for_the_panel(three, tmp_path, recwarn):
    """A long name is cut, and control characters are shown as such: the figure is laid out and its file is XML."""
    names = {"x" * 500: 0.1, "\x00\x1b[2J <b>": 0.2, "plain": 0.3}
    run = replace(three[2], validations=[row | {"by_category": names} for row in three[2].validations])
    figure = draw("validation", [run])
    file = save_figure(figure, tmp_path / "validation.svg")
    texts = [element.text for element in ElementTree.parse(file).iter() if element.tag.endswith("text")]
    assert "??[2J <b>" in texts and "x" * 23 + "\N{HORIZONTAL ELLIPSIS}" in texts
    assert not [warning for warning in recwarn if "layout" in str(warning.message)]


def test_effective_queries_and_replay_share_a_panel(three):
    """Both shares of one run over its steps; without replay the first alone."""
    drawn = lines(draw("effective_queries", three[2:]).axes[0])
    np.testing.assert_allclose(drawn["effective queries"], [range(1, 7), [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]])
    np.testing.assert_allclose(drawn["replay's share of the batch"], [range(1, 7), np.arange(1, 7) / 10])
    assert list(lines(draw("effective_queries", three[:1]).axes[0])) == ["effective queries"]


def test_draws_by_category_beside_the_fresh_queries(three):
    """Shares in per cent at the steps that have them; a run that replays nothing has no such figure."""
    fresh, draws = (lines(axes) for axes in draw("replay_categories", three[2:]).axes)
    np.testing.assert_allclose(fresh["6 terms"], [range(1, 7), [25] * 6])
    np.testing.assert_allclose(draws["6 terms"], [range(2, 7), [50] * 5])
    assert list(fresh) == list(draws) == ["2 terms", "6 terms"]
    assert draw("replay_categories", three[:1]) is None


def with_tools(folder, name="ssr", failures=None, **metrics):
    """A run with an environment: tool calls grow with the steps; `failures` by step."""
    run = write_run(folder, name)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for step, row in enumerate(rows, start=1):
        row |= {"turns_mean": 1 + step / 4, "tool_calls_mean": step / 4, "tool_use_ratio": step / 8}
        row |= {"environment_failures": (failures or {}).get(step, {})} | metrics
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_tool_use_over_steps(tmp_path):
    """Turns, calls and the share that calls, of the runs that have an environment; a page about others does not speak
    of it, even as of something that is missing."""
    runs = read_runs([with_tools(tmp_path / "tools", "grpo"), write_run(tmp_path / "none", "ssr")])
    panels = {axes.get_title(loc="left"): lines(axes) for axes in draw("tools", runs).axes}
    shown = {title: drawn["grpo"][1][-1] for title, drawn in panels.items()}
    assert shown == {
        "responses that call a tool (0 to 1)": 0.75,
        "tool calls per response": 1.5,
        "turns per response": 2.5,
    }
    assert all(list(drawn) == ["grpo"] for drawn in panels.values())
    asked = {figure.name for figure in figures.FIGURES if figure.suits(runs)}
    plain = {figure.name for figure in figures.FIGURES if figure.suits(runs[1:])}
    assert {"tools", "environment_failures"} <= asked - plain
    assert "Tool use" not in write_report([tmp_path / "none"]).read_text()


def test_what_failed_in_the_environment(tmp_path):
    """Of one run a line per reason, 0 where a step has none of it; of several a run's sum, without runs that have no
    environment; nothing where nothing failed."""
    failures = {2: {"timeout": 0.5}, 3: {"timeout": 0.25, "box": 0.125}}
    one = with_tools(tmp_path / "one", "grpo", failures)
    (run,) = read_runs([one])
    (axes,) = draw("environment_failures", [run]).axes
    drawn = lines(axes)
    np.testing.assert_allclose(drawn["timeout"], [range(1, 7), [0, 0.5, 0.25, 0, 0, 0]])
    np.testing.assert_allclose(drawn["box"], [range(1, 7), [0, 0, 0.125, 0, 0, 0]])
    runs = read_runs([one, with_tools(tmp_path / "two", "filter"), write_run(tmp_path / "none", "ssr")])
    (axes,) = draw("environment_failures", runs).axes
    drawn = lines(axes)
    np.testing.assert_allclose(drawn["grpo"][1], [0, 0.5, 0.375, 0, 0, 0])
    np.testing.assert_allclose(drawn["filter"][1], [0] * 6)
    assert list(drawn) == ["grpo", "filter"] and draw("environment_failures", runs[1:]) is None


def test_stages_are_one_line(tmp_path):
    """The later stage's steps come behind the earlier one's, with a line at the join; its validation of the checkpoint
    that it starts from stands there."""
    one, two = write_stages(tmp_path)
    (run,) = read_runs([two])
    assert (run.label, run.joins, [stage.label for stage in run.earlier]) == ("stage2", (6,), ["stage1"])
    for name in ("kinds", "validation", "response_length", "effective_queries", "reward", "replay_categories"):
        assert all(joins(axes) == [6] for axes in draw(name, [run]).axes), name
    axes = draw("validation", [run]).axes[0]
    np.testing.assert_allclose(lines(axes)["overall"], [[0, 3, 6, 10], [0.25, 0.5, 0.5, 0.75]])
    assert run.series("reward_mean").index.tolist() == list(range(1, 11))
    np.testing.assert_allclose(run.series("reward_mean").iloc[[0, 5, 6, 9]], [0.45, 0.7, 0.45, 0.6])
    assert joins(draw("reward", read_runs([one])).axes[0]) == []


def test_each_stage_is_drawn_once(tmp_path):
    """Given beside the run that goes on from it, in any order, a run is part of that one; three stages are a chain."""
    one, two = write_stages(tmp_path)
    three = write_run(tmp_path / "stage3", steps=2, model=two / "checkpoints" / "last")
    for folders in ([one, two], [two, one], [two]):
        assert [(run.name, run.joins) for run in read_runs(folders)] == [("stage2", (6,))]
    (run,) = read_runs([one, three])
    assert [stage.name for stage in all_stages([run])] == ["stage1", "stage2", "stage3"] and run.joins == (6, 10)
    other = write_run(tmp_path / "other", "grpo")
    assert [run.label for run in read_runs([one, other, two])] == ["other", "stage2"]


def test_an_earlier_run_that_is_gone(tmp_path):
    """The later run stands alone; moved together, both are found; a run that names itself or a plain model is alone."""
    _, two = write_stages(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    two = tmp_path / "new" / two.name
    assert read_runs([two])[0].joins == (6,)
    with (tmp_path / "new" / "stage1" / "metrics.jsonl").open("a") as damaged:
        damaged.write("no object\n")
    assert not read_runs([two])[0].earlier  # what cannot be read does not end a run that has trained
    shutil.rmtree(tmp_path / "new" / "stage1")
    (run,) = read_runs([two])
    assert not run.earlier and not run.joins and run.series("val_accuracy").index.tolist() == [0, 4]
    for name in (tmp_path / "itself" / "checkpoints" / "best", "checkpoints/best", "x" * 300 + "/checkpoints/best"):
        shutil.rmtree(tmp_path / "itself", ignore_errors=True)
        (run,) = read_runs([write_run(tmp_path / "itself", model=name)])
        assert not run.earlier


def test_nothing_to_draw_is_no_figure(tmp_path):
    """A run that logged a reward alone has the reward's figure and no other."""
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "reward_mean": 0.5}\n{"step": 2, "reward_mean": null}\n')
    runs = read_runs([folder])
    shown = [figure for figure in (*STORY, *figures.FIGURES) if figure.suits(runs)]
    assert [figure.name for figure in shown if figure.drawn(runs)] == ["reward"]
    np.testing.assert_allclose(lines(draw("reward", runs).axes[0])["bare"], [[1], [0.5]])


def test_long_lines_make_no_long_file(tmp_path):
    """However long the run, a figure's file stays small: no point is written that nobody could see."""
    run = write_run(tmp_path / "run")
    rewards = np.random.default_rng(0).random(20_000)
    rows = [{"step": step, "reward_mean": reward} for step, reward in enumerate(rewards, start=1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert save_figure(draw("reward", read_runs([run])), tmp_path / "reward.svg").stat().st_size < 100_000


def test_names_are_drawn_as_they_are(tmp_path):
    """A name with dollar signs is no formula and one that begins with _ is no secret; markup in it stays text."""
    hostile = ["_run$\\frac{$", "$\\frac{$", "</svg><script>alert(1)</script>"]
    folders = [write_run(tmp_path / str(i), "ssr") for i in range(3)]
    runs = read_runs(folders)
    runs = [replace(run, label=name) for run, name in zip(runs, hostile, strict=True)]
    figure = draw("reward", runs)
    svg = save_figure(figure, tmp_path / "reward.svg").read_text()
    assert "_run$\\frac{$" in svg
    assert "<script" not in svg and "&lt;script&gt;alert(1)" in svg


def test_rethinking_analysis(tmp_path):
    """Relative improvement over the baseline in per cent: forced, oracle, trained with it; its ratio as a line."""
    base, trained = "runs/plain/checkpoints/best", "runs/forced/checkpoints/best"
    results = {
        (trained, "normal"): (0.60, 0.33),  # first on purpose: the baseline is the one that was probed
        (base, "normal"): (0.50, 0.30),
        (base, "forced"): (0.55, 0.27),
        (base, "oracle"): (0.65, 0.36),
    }
    for (model, mode), values in results.items():
        for benchmark, accuracy, ratio in zip(("MathVista", "EMMA"), values, (0.2, 0.8), strict=True):
            folder = tmp_path / f"{len(list(tmp_path.iterdir())):02d}"
            write_evaluation(folder, model, benchmark, mode, accuracy, ratio)
    baseline, table = compare(read_evaluations([tmp_path]))
    assert baseline == base and list(table.baseline) == [0.5, 0.3]
    assert list(table["trained with it: forced"]) == [0.6, 0.33]
    bars, line = rethinking_analysis(table).axes
    drawn = heights(bars)
    np.testing.assert_allclose(drawn["rethinking forced"], [10, -10])
    np.testing.assert_allclose(drawn["forced where wrong (upper bound)"], [30, 20])
    np.testing.assert_allclose(drawn["trained with it: forced"], [20, 10])
    np.testing.assert_allclose(lines(line)["rethinks by itself"][1], [20, 80])
    assert [tick.get_text() for tick in bars.get_xticklabels()] == ["MathVista", "EMMA"]
    save_figure(bars.figure, tmp_path / "rethinking.svg")


def test_incomplete_evaluations(tmp_path):
    """What was not evaluated has no bar; a baseline alone, or one that is never right, is an error."""
    write_evaluation(tmp_path / "a", "base", "one", "normal", 0.5)
    with pytest.raises(ConfigError, match="--eval: .* nothing to compare"):
        compare(read_evaluations([tmp_path / "a"]))
    write_evaluation(tmp_path / "b", "base", "one", "forced", 0.6)
    write_evaluation(tmp_path / "c", "base", "two", "normal", 0.5)
    write_evaluation(tmp_path / "d", "base", "three", "normal", 0.0)
    _, table = compare(read_evaluations([tmp_path]))
    assert list(table.index) == ["one", "two"] and np.isnan(table.iloc[1, 1])
    drawn = heights(rethinking_analysis(table).axes[0])
    np.testing.assert_allclose(drawn["rethinking forced"], [20, np.nan])
    write_evaluation(tmp_path / "e" / "z", "base", "zero", "normal", 0.0)
    with pytest.raises(ConfigError, match="nothing to compare"):
        compare(read_evaluations([tmp_path / "e"]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no result.json"),
        ("{", "no result of"),
        ("[]", "no result of"),
        ('{"model": "m", "benchmark": "b", "mode": "normal"}', "no result of .*KeyError: 'accuracy'"),
    ],
)
def test_results_that_cannot_be_read_are_named(tmp_path, content, message):
    """The error names the folder or the file and what is wrong with it."""
    if content is not None:
        (tmp_path / "result.json").write_text(content)
    with pytest.raises(ConfigError, match=message) as error:
        read_evaluations([tmp_path])
    assert str(tmp_path) in str(error.value)


def test_the_same_numbers_give_the_same_file(tmp_path, three):
    """Figures are repeatable to the byte."""
    first, second = (save_figure(draw("reward", three), tmp_path / f"{n}.svg").read_bytes() for n in "ab")
    assert first == second and b"<text" in first
    assert new_figure(1, 1).axes == []
