"""The ablation's numbers and figures, of made-up runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from benchmarks import ablation_figures
from benchmarks import ablation_summary as summary
from benchmarks.ablation_methods import METHODS
from rethinker.evaluation.intervals import mean_interval

CATEGORIES = {"2 terms": 1.0, "3 terms": 0.25}


METRICS = {**dict.fromkeys(summary.PER_STEP, 0.25), "advantage_histogram": [2, 1, 0, 0, 0, 0]}


def write_run(folder: Path, steps: int, accuracies: dict[int, float]) -> None:
    """What a run of 100 tokens a step leaves."""
    folder.mkdir(parents=True)
    rows = [
        METRICS
        | {"step": step, "generated_tokens": 100 * step, "response_length_mean": step, "rethink_ratio": step / steps}
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = [
        {"step": s, "val_accuracy": a, "by_category": CATEGORIES, "questions": 8} for s, a in accuracies.items()
    ]
    (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))


def result(seed: int, accuracy: float, curve=None) -> dict:
    steps = 8
    per_step = {name: np.linspace(0.1, 0.8, steps).tolist() for name in summary.PER_STEP}
    per_step["generated_tokens"] = [1000 * (step + 1) for step in range(steps)]
    return {
        **dict.fromkeys(summary.AVERAGED, 0.5),
        "seed": seed,
        "accuracy": accuracy,
        "curve": curve or [[0, 0.3], [8000, accuracy]],
        "by_category": CATEGORIES,
        "advantages": [4, 3, 2, 1, 0, 0],
        "per_step": per_step,
    }


class TestNumbers:
    def test_intervals_are_those_of_a_paired_t_test(self):
        """scipy's paired t-test gives the same mean and interval, whatever the order of the seeds."""
        rng = np.random.default_rng(0)
        ours, theirs = rng.normal(0.6, 0.05, 6), rng.normal(0.5, 0.05, 6)
        forwards = [result(seed, accuracy) for seed, accuracy in enumerate(ours)]
        backwards = [result(seed, accuracy) for seed, accuracy in enumerate(theirs)][::-1]
        found = summary.difference(forwards, [*backwards, result(9, 5.0)])
        low, high = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
        assert (found["mean"] - found["half_95"], found["mean"] + found["half_95"]) == pytest.approx((low, high))
        assert found["seeds"] == 6
        low, high = stats.ttest_1samp(ours, 0).confidence_interval(0.95)
        mean, half = mean_interval(ours.tolist())
        assert (mean - half, mean + half) == pytest.approx((low, high))

    def test_a_constant_gap_has_no_width(self):
        """However much the seeds differ, a difference that all of them have is certain."""
        theirs = [result(seed, accuracy) for seed, accuracy in enumerate((0.5, 0.7, 0.9))]
        ours = [result(seed, accuracy - 0.1) for seed, accuracy in enumerate((0.5, 0.7, 0.9))]
        found = summary.difference(ours, theirs)
        assert (found["mean"], found["half_95"]) == (pytest.approx(-0.1), pytest.approx(0, abs=1e-12))
        assert summary.difference(ours[:1], theirs[1:]) is None
        assert summary.difference(ours[:1], theirs)["half_95"] is None

    def test_a_difference_after_the_same_tokens(self):
        """Between two answers the accuracy is on the line between them; after the last one it stays."""
        longer = [
            result(seed, 0.6 + gap, [[0, 0.2], [8000, 0.4], [12000, 0.6 + gap]]) for seed, gap in enumerate((0, 0.02))
        ]
        shorter = [result(seed, 0.5, [[0, 0.2], [10000, 0.5]]) for seed in range(2)]
        assert [summary.accuracy_after(tokens, longer[0]) for tokens in (4000, 10000, 20000)] == pytest.approx(
            [0.3, 0.5, 0.6]
        )
        found = summary.difference(longer, shorter, 10000)
        low, high = stats.ttest_1samp([0.0, 0.01], 0).confidence_interval(0.95)
        assert (found["mean"], found["half_95"]) == (pytest.approx(0.005), pytest.approx((high - low) / 2))
        row = summary.summarise(longer, {"GRPO": shorter}, 10000)
        assert row["minus_grpo_at_budget"] == found and row["minus"]["GRPO"]["mean"] == pytest.approx(0.11)
        assert row["accuracies_at_budget"] == pytest.approx([0.5, 0.51])

    def test_the_pooled_interval_is_that_of_least_squares(self):
        """Of two methods the paired one; of several that of a regression on method and seed; of accuracies after the
        same tokens, where they are known. A method with other seeds does not count."""
        rng = np.random.default_rng(0)
        table = rng.normal(0.7, 0.02, (4, 3)) + rng.normal(0, 0.1, 3)

        def pooled(accuracies, **others):
            rows = [{"seeds": [*range(len(own))], "accuracies": own, **others} for own in accuracies.tolist()]
            return summary.pooled_interval([*rows, {"seeds": [9], "accuracies": [0.1]}])

        half, freedom = pooled(table[:2])
        assert (half, freedom) == (pytest.approx(mean_interval(table[0] - table[1])[1]), 2)
        half, freedom = pooled(table)
        methods, seeds = (np.repeat(np.arange(4), 3), np.tile(np.arange(3), 4))
        design = np.column_stack([np.eye(4)[methods], np.eye(3)[seeds][:, 1:]])
        _, (squares,), *_ = np.linalg.lstsq(design, table.ravel())
        error = np.sqrt(squares / 6 * np.linalg.inv(design.T @ design)[:2, :2] @ [1, -1] @ [1, -1])
        assert (half, freedom) == (pytest.approx(stats.t.ppf(0.975, 6) * error), 6)
        assert pooled(table, accuracies_at_budget=[0.5, 0.6, 0.7]) == (pytest.approx(0, abs=1e-12), 6)
        assert pooled(table[:, :1]) is None and pooled(table[:1]) is None

    def test_tokens_to_the_final_accuracy_of_grpo(self):
        """A curve that rises twice as fast is there after half of the tokens, one that ends lower never is."""
        slow = [result(seed, 0.5, [[0, 0.3], [4000, 0.4], [8000, 0.5]]) for seed in range(3)]
        fast = [result(seed, 0.7, [[0, 0.3], [8000, 0.7]]) for seed in range(3)]
        assert summary.share_of_tokens(fast, slow) == pytest.approx(0.5)
        assert summary.share_of_tokens(slow, slow) == pytest.approx(1.0)
        assert summary.share_of_tokens(slow, fast) is None
        assert summary.share_of_tokens(fast, []) is None
        longer = [result(seed, 0.7, [[0, 0.3], [10000, 0.3], [20000, 0.7]]) for seed in range(3)]
        assert summary.share_of_tokens(longer, slow) == pytest.approx(15 / 8)

    def test_a_lucky_point_is_not_the_first_to_reach_it(self):
        """A single point above the level, after which the curve falls below it again, is averaged with the next one."""
        slow = [result(0, 0.5, [[0, 0.3], [8000, 0.5]])]
        lucky = [result(0, 0.5, [[0, 0.3], [2000, 0.51], [3000, 0.35], [8000, 0.5]])]
        assert summary.share_of_tokens(lucky, slow) > 0.9

    def test_stages_are_joined(self, tmp_path):
        """Tokens go on from the first stage, the switch counts once, and the ends are those of the whole."""
        both = []
        for number, (steps, accuracies) in enumerate([(6, {0: 0.3, 4: 0.4, 6: 0.5}), (2, {0: 0.51, 2: 0.6})]):
            write_run(tmp_path / str(number), steps, accuracies)
            both.append(summary.stage_result(tmp_path / str(number)))
        found = summary.joined(*both)
        assert found["curve"] == [[0, 0.3], [400, 0.4], [600, 0.5], [800, 0.6]]
        assert (found["accuracy_before"], found["accuracy_switch"], found["accuracy"]) == (0.3, 0.51, 0.6)
        assert found["per_step"]["generated_tokens"] == [100 * step for step in range(1, 9)]
        assert (found["steps"], found["generated_tokens"]) == (8, 800)
        assert found["response_length_start"] == 1 and found["response_length_end"] == 1.5  # of the second's 1 and 2
        assert (found["rethinks_start"], found["rethinks_end"]) == (0.5, 1.0)  # of the second stage alone
        assert found["advantages"] == [16, 8, 0, 0, 0, 0]

    def test_tables(self):
        """A table per part, whose rows have equally many cells, and a warning where models differed at the start."""
        own = {name: [result(seed, 0.5 + 0.1 * seed) for seed in range(3)] for name in METHODS}
        rows = [{"method": name, **summary.summarise(results, own, 8000)} for name, results in own.items()]
        alone = [{"method": "alpha 0", **summary.summarise(own["SSR"][:1], own, 8000)}]
        methods = {"task": "sums", "part": "methods", "tokens": 9000}
        content = [methods | {"rows": rows}, {"task": "sums", "part": "alpha", "tokens": 8000, "rows": alone}]
        text = summary.tables(content)
        lines = [line for line in text.splitlines() if line.startswith("|")]
        assert len(lines) == 6 + 3 and len({line.count("|") for line in lines}) == 1
        assert "## sums: methods" in text and "## sums: alpha" in text and "same model" not in text
        assert "| full | 0.600 ± 0.248 | +0.000 ± 0.000 |" in text and "| alpha 0 | 0.500 | +0.000 |" in text
        assert "9,000 tokens" in text and "8,000 tokens" in text
        assert text.count("a difference has ± 0.000 (6 degrees of freedom)") == 1
        without_full = [{"method": "x", **summary.summarise(own["SSR"], {"GRPO": own["GRPO"]}, 8000)}]
        assert "minus full" in text and "minus full" not in summary.tables([methods | {"rows": without_full}])
        other = rows[1] | {"accuracy_before": 0.6}
        assert "same model" in summary.tables([methods | {"rows": [rows[0], other]}])
        assert "same model" not in summary.tables([methods | {"rows": [rows[0], other | {"seeds": [0]}]}])


class TestFigures:
    def test_curves_meet_at_the_same_tokens(self):
        """Seeds are compared where all of them have been."""
        table = ablation_figures.over_tokens([([0, 4000], [0.0, 0.4]), ([1000, 5000], [0.1, 0.5])], points=4)
        assert table.index.tolist() == [1.0, 2.0, 3.0, 4.0]
        assert table[0].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4]) == table[1].tolist()

    def test_accuracies_are_drawn_where_they_were_measured(self):
        """The marks of figure 5 are no points between two measurements."""
        table = ablation_figures.over_tokens([([0, 3000, 5000], [0.0, 0.6, 0.8]), ([0, 1000, 4000], [0.0, 0.2, 0.4])])
        assert table.index.tolist() == [0.0, 2.0, 4.0]
        assert table[0].tolist() == pytest.approx([0.0, 0.4, 0.7])

    def test_rethinking_is_compared_by_category(self, tmp_path):
        """The means over seeds of every category, and of all questions."""
        found = []
        right = {"normal": ([1.0, 0.0, 0.0], [1.0, 1.0, 0.0]), "forced": ([0.0, 1.0, 1.0], [0.0, 1.0, 1.0])}
        for seed in range(2):
            for mode, rewards in right.items():
                answers = {
                    "category": ["2 terms", "3 terms", "3 terms", "never trained"],
                    "reward": [*rewards[seed], 1.0],
                    "rethinks": [False, True, False, True],
                }
                found.append(("SSR", mode, tmp_path / f"{seed} {mode}"))
                found[-1][2].mkdir()
                pd.DataFrame(answers).to_parquet(found[-1][2] / "responses.parquet")
        rows = ablation_figures.rethinking_accuracies(found, CATEGORIES)
        assert [list(row.values()) for row in rows] == [
            ["2 terms", 1.0, 0.0, 0.0],
            ["3 terms", 0.25, 1.0, 0.5],
            ["all", 0.5, pytest.approx(2 / 3), pytest.approx(1 / 3)],
        ]
        assert list(rows[0]) == ["category", "baseline", "rethinking forced", "rethinks by itself"]
        for _, _, folder in found:
            answers = pd.read_parquet(folder / "responses.parquet")
            answers.assign(reward=0.0).to_parquet(folder / "responses.parquet")
        assert ablation_figures.rethinking_accuracies(found, CATEGORIES) == []

    def test_every_method_is_in_every_figure(self, tmp_path):
        results = {name: [result(seed, 0.5) for seed in range(2)] for name in METHODS}
        files = ablation_figures.draw_figures("sums", results, [], {}, tmp_path)
        assert [file.name for file in files] == [
            f"ablation_sums_{name}.svg" for name in ("effective_queries", "curves", "advantages")
        ]
        for file in files:
            assert all(f">{name}<" in file.read_text() for name in METHODS)
        assert ablation_figures.draw_figures("sums", {}, [], {}, tmp_path) == []

    def test_differences_to_grpo(self):
        """A row for each other method, in the table's order: mean, interval, and the seeds that both have."""
        own = {name: [result(seed, 0.5 + 0.02 * i * seed) for seed in range(3)] for i, name in enumerate(METHODS)}
        own["filter"] = [result(seed, 0.55) for seed in (1, 2, 7)]
        names = ["GRPO", "full", "SSR", "filter"]
        rows = [{"method": name, **summary.summarise(own[name], own, 8000)} for name in names]
        (axes,) = ablation_figures.differences(rows).axes
        assert [text.get_text() for text in axes.get_yticklabels()] == ["full", "SSR", "filter"]
        drawn = [line.get_xdata() for line in axes.lines if line.get_marker() == "|"]
        assert [len(seeds) for seeds in drawn] == [3, 3, 2]
        assert drawn[0] == pytest.approx([0, -6, -12]) and drawn[2] == pytest.approx([-1, -7])
        means = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]
        assert means == pytest.approx([100 * row["minus_grpo_at_budget"]["mean"] for row in rows[1:]])
