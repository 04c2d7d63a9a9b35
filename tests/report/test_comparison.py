"""Runs in one table of numbers: which are one row, what its numbers are, and which interval each one has."""

from __future__ import annotations

import csv
import hashlib
import json

import numpy as np
import pytest
from scipy import stats

from rethinker import cli
from rethinker.evaluation.intervals import paired_difference, unpaired_difference, wilson_interval
from rethinker.report import page
from rethinker.report.comparison import NOTES, as_text, compare_runs, comparison, write_comparison
from rethinker.report.page import write_report
from rethinker.report.runs import read_runs
from tests.report.examples import write_run


@pytest.fixture
def no_figures(monkeypatch):
    """The page without its figures, which take most of its time."""
    monkeypatch.setattr(page, "FIGURES", ())
    monkeypatch.setattr(page, "STORY", ())


def run_of(folder, accuracies, *, seed=0, questions=8, tokens=100, model="tiny", answers=None, steps=6, **settings):
    """A run with these accuracies by step and so many questions, which samples so many tokens a step; `answers` are the
    last verdicts on q0, q1, ... in the order asked; `settings` replace values in config.yaml."""
    write_run(folder, seed=seed, accuracies=accuracies, model=model, steps=steps)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    counted = [row | {"generated_tokens": tokens * row["step"]} for row in rows]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in counted))
    if accuracies:
        rows = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
        rows = [row | {"questions": questions} for row in rows]
        if answers is not None:
            right = "".join(str(int(right)) for right in answers.values())
            rows[-1] |= {"right": right, "asked": hashlib.sha256(repr([*answers]).encode()).hexdigest()[:16]}
        (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = (folder / "config.yaml").read_text()
    for name, value in settings.items():
        old = next(line for line in config.splitlines() if line.strip().startswith(f"{name}:"))
        config = config.replace(old, f"{old.partition(':')[0]}: {value}")
    (folder / "config.yaml").write_text(config)
    return folder


def compared(*folders):
    return compare_runs(read_runs(folders))


def ends(record, name):
    return record[f"{name}_low"], record[f"{name}_high"]


def test_seeds_of_one_configuration_are_one_row(tmp_path):
    """Three seeds, whose warm-ups, names, folders and checkpoints differ too: their mean and Student's t over
    them, as scipy has it. Another clip is another row, which its label names."""
    last = [0.5, 0.625, 0.75]
    seeds = [run_of(tmp_path / f"s{i}", {0: 0.25, 6: a}, seed=i, keep=10 + i) for i, a in enumerate(last)]
    other = run_of(tmp_path / "o", {0: 0.25, 6: 0.5}, clip_high=0.5)
    one, two = compared(*seeds, other)
    assert (one["label"], two["label"]) == ("clip_high=0.35", "clip_high=0.5")
    assert (one["runs"], one["seeds"]) == ("s0 s1 s2", "0, 1, 2")
    assert one["last"] == pytest.approx(0.625) and one["last_interval"] == "t, 3 seeds"
    assert ends(one, "last") == pytest.approx(tuple(stats.ttest_1samp(last, 0).confidence_interval(0.95)))
    assert ends(one, "start") == (0.25, 0.25)
    (alone,) = compared(*seeds)
    assert alone["label"] == "s0 and 2 more" and "difference" not in alone


def test_one_run_has_wilsons_interval(tmp_path):
    """Of its questions; where their number is not known there is none, and the best accuracy never has one."""
    one, two = compared(
        run_of(tmp_path / "a", {0: 0.25, 3: 0.75, 6: 0.625}),
        run_of(tmp_path / "b", {0: 0.25, 6: 0.5}, questions=None, clip_high=0.5),
    )
    assert ends(one, "last") == wilson_interval(5, 8) and one["last_interval"] == "Wilson, 8 questions"
    assert ends(one, "start") == wilson_interval(2, 8)
    assert one["best"] == 0.75 and "best_low" not in one
    assert two["last"] == 0.5 and "last_low" not in two
    assert two["difference"] == -0.125 and two["difference_interval"] == "no interval: number of questions unknown"


def test_the_difference_is_paired_by_seed(tmp_path):
    """The same seeds: the t interval of their gaps, though the seeds come in another order; seeds that only one row has
    do not count. Other seeds: Welch's. One seed against several: none."""
    base, ours = [0.25, 0.5, 0.625], [0.375, 0.5, 0.875]
    first = [run_of(tmp_path / f"a{i}", {6: a}, seed=i) for i, a in enumerate(base)]
    second = [run_of(tmp_path / f"b{i}", {6: ours[i]}, seed=i, clip_high=0.5) for i in (2, 0, 1)]
    third = [run_of(tmp_path / f"c{i}", {6: a}, seed=i + 7, clip_high=0.6) for i, a in enumerate(ours)]
    fourth = [run_of(tmp_path / f"d{i}", {6: a}, seed=i, clip_high=0.7) for i, a in ((1, 0.75), (2, 0.625), (5, 1.0))]
    fifth = run_of(tmp_path / "e", {6: 0.5}, clip_high=0.8)
    _, same, others, some, single = compared(*first, *second, *third, *fourth, fifth)
    assert same["difference"] == pytest.approx(0.125) and same["difference_interval"] == "t, paired by 3 seeds"
    assert ends(same, "difference") == pytest.approx(tuple(stats.ttest_rel(ours, base).confidence_interval(0.95)))
    assert others["difference"] == pytest.approx(0.125)
    assert others["difference_interval"] == "Welch's t, unpaired, 3 and 3 seeds"
    welch = stats.ttest_ind(ours, base, equal_var=False).confidence_interval(0.95)
    assert ends(others, "difference") == pytest.approx(tuple(welch))
    assert some["difference"] == pytest.approx(0.125) and some["difference_interval"] == "t, paired by 2 seeds"
    assert single["difference_interval"] == "no interval: one seed against several"
    assert "difference_low" not in single


def test_one_seed_twice_is_one_sample(tmp_path):
    """A copy of a run says nothing of what another seed would do: no interval, nor of the difference."""
    runs = [run_of(tmp_path / f"{name}", {0: 0.25, 6: 0.5}, seed=3) for name in "ab"]
    others = [run_of(tmp_path / f"o{seed}", {0: 0.25, 6: 0.75}, seed=seed, clip_high=0.5) for seed in (3, 4)]
    one, two = compared(*runs, *others)
    assert one["last_interval"] == two["difference_interval"] == "no interval: two runs of one seed"
    assert "last_low" not in one and "difference_low" not in two and two["difference"] == pytest.approx(0.25)
    assert two["last_interval"] == "t, 2 seeds"


def test_the_difference_of_two_runs_is_paired_by_question(tmp_path):
    """Where both last validated on the same questions; otherwise it is unpaired, and it says so where the questions are
    others."""
    rights = {number: number < 4 for number in range(8)}
    ours = {number: number in (0, 1, 2, 5, 6, 7) for number in range(8)}
    others = {number + 1: right for number, right in ours.items()}
    rows = compared(
        run_of(tmp_path / "a", {6: 0.5}, answers=rights),
        run_of(tmp_path / "b", {6: 0.75}, answers=ours, clip_high=0.4),
        run_of(tmp_path / "c", {6: 0.75}, answers=others, clip_high=0.5),
        run_of(tmp_path / "d", {6: 0.75}, clip_high=0.7),
        run_of(tmp_path / "e", {6: 0.75}, questions=16, clip_high=0.8),
    )
    kinds = [row.get("difference_interval") for row in rows]
    assert kinds[:3] == [None, "paired by 8 questions", "unpaired, 8 and 8 other questions"]
    assert kinds[3:] == ["unpaired, 8 and 8 questions", "unpaired, 8 and 16 other questions"]
    assert (rows[1]["difference"], *ends(rows[1], "difference")) == paired_difference(3, 1, 3, 1)
    for row in rows[2:4]:
        assert (row["difference"], *ends(row, "difference")) == unpaired_difference(4, 8, 6, 8)
    assert (rows[4]["difference"], *ends(rows[4], "difference")) == unpaired_difference(4, 8, 12, 16)


@pytest.mark.parametrize(
    "damage",
    [
        *({"right": "1111"}, {"right": "1111xx00"}, {"right": 11110000}, {"asked": ""}, {"asked": 1}),
        *({"questions": 4, "right": "1100"}, {"questions": 0, "right": ""}, {"questions": True, "right": "1"}),
        *({"questions": [8]}, {"step": 2**53 + 1}, None),
    ],
)
def test_verdicts_that_cannot_be_are_not_paired(damage, tmp_path):
    """They are as good as none, and so is a number of questions that is none; None: the last line is not there."""
    rights = {number: number < 4 for number in range(8)}
    a = run_of(tmp_path / "a", {0: 0.5, 6: 0.5}, answers=rights)
    b = run_of(tmp_path / "b", {0: 0.5, 6: 0.5}, answers=rights, clip_high=0.4)
    *rows, last = map(json.loads, (b / "metrics.jsonl").read_text().splitlines())
    rows = [*rows, last | {"val_accuracy": 0.5}]  # a run writes it there, too
    (b / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert compared(a, b)[1]["difference_interval"] == "paired by 8 questions"
    *rows, last = map(json.loads, (b / "validation.jsonl").read_text().splitlines())
    rows = rows if damage is None else [*rows, last | damage]
    (b / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "paired by" not in compared(a, b)[1]["difference_interval"]
    (b / "validation.jsonl").unlink()
    assert compared(a, b)[1]["difference_interval"] == "no interval: number of questions unknown"


def test_numbers_of_a_run(tmp_path):
    """Reward and length of the last tenth, tokens and seconds of all steps, steps, effective queries; by hand."""
    (one,) = compared(run_of(tmp_path / "a", {0: 0.25, 20: 0.5}, steps=20))
    assert one["reward"] == pytest.approx(np.mean([0.4 + step / 20 for step in (19, 20)]))
    assert one["length"] == pytest.approx(39.5) and one["steps"] == 20 and one["tokens"] == 2000
    assert one["step_s"] == 4.0 and one["tokens_per_s"] == pytest.approx(2000 / 80)
    assert one["effective"] == pytest.approx(np.mean([1 - step / 10 for step in range(1, 21)]))


def test_tokens_to_the_first_rows_accuracy(tmp_path):
    """A run that learns twice as fast is there after half of the tokens; one that ends lower never is; the first row
    itself is there at its end."""
    rows = compared(
        run_of(tmp_path / "a", {0: 0.25, 6: 0.5}),
        run_of(tmp_path / "b", {0: 0.25, 6: 0.75}, clip_high=0.4),
        run_of(tmp_path / "c", {0: 0.25, 6: 0.375}, clip_high=0.5),
        run_of(tmp_path / "d", {6: 0.75}, clip_high=0.6),
    )
    assert [row.get("tokens_to_level") for row in rows] == [pytest.approx(600), pytest.approx(300), "not reached", None]
    table = comparison(rows)
    assert table["tokens to 0.500"].tolist() == ["600", "300", "not reached", ""]


def test_what_a_run_lacks_is_left_out(tmp_path):
    """No validation, accuracies and rewards that are NaN, no settings, no tokens: rows without these numbers."""
    bare = run_of(tmp_path / "bare", {}, clip_high=0.4)
    odd = run_of(tmp_path / "odd", {0: 0.25, 6: 0.5}, clip_high=0.5)
    for name, key, step in (("validation.jsonl", "val_accuracy", 6), ("metrics.jsonl", "reward_mean", 6)):
        rows = [json.loads(line) for line in (odd / name).read_text().splitlines()]
        rows = [row | ({key: float("nan")} if row["step"] == step else {}) for row in rows]
        (odd / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    old = write_run(tmp_path / "old", accuracies={0: 0.25, 6: 0.5})  # counted no tokens
    (old / "config.yaml").unlink()
    first, second, third = compared(bare, odd, old)
    assert [row["label"] for row in (first, second, third)] == ["bare", "odd", "old"]  # one's settings are unknown
    assert not {"start", "last", "best", "last_interval", "difference", "tokens_to_level"} & {*first}
    assert (
        "difference" not in second and "tokens_to_level" not in second
    )  # the first row has nothing to be compared with
    assert second["last"] == second["start"] == 0.25  # the last one that is a number
    assert second["reward"] == pytest.approx(0.4 + 5 / 20)
    assert "tokens" not in third and "tokens_per_s" not in third and third["seeds"] == ""
    text = as_text([first, second, third], 200)
    assert "nan" not in text.lower().replace("another", "") and "difference " not in text.splitlines()[0]
    assert compared(odd, bare)[1].get("difference") is None


def test_three_stages_are_one_run(tmp_path):
    """A run of three stages counts the steps and tokens of all, starts where the first did, ends where the last did,
    and its answers are those after the last one. Seeds are those of all stages; a stage's setting is named with it."""

    def chain(name, seed, last, answers, begin=0, **settings):
        before = "tiny"
        for number in (1, 2, 3):
            folder = tmp_path / f"{name}{number}"
            accuracies = {0: 0.125 * number, 6: 0.125 * number + 0.125}
            if number == 3:
                accuracies |= {6: last}
            extra = {"answers": answers, **settings} if number == 3 else {}
            run_of(
                folder,
                accuracies,
                seed=seed + 10 * number + (number == 1) * begin,
                model=before,
                tokens=100 * number,
                **extra,
            )
            before = folder / "checkpoints" / "best"
        return folder

    rights = {number: number < 4 for number in range(8)}
    first = chain("a", 0, 0.5, rights)
    again = chain("b", 1, 0.75, rights)
    other = chain("c", 0, 0.625, {n: n != 0 and n < 6 for n in range(8)}, clip_high=0.5)
    one, two = compared(first, again, other)
    assert (one["label"], two["label"]) == ("stage 3: clip_high=0.35", "stage 3: clip_high=0.5")
    assert one["runs"] == "a3 b3" and one["seeds"] == "10, 11"
    assert (two["start"], two["last"], two["steps"], two["tokens"]) == (0.125, 0.625, 18, 600 + 1200 + 1800)
    begun_elsewhere = [chain(name, seed, 0.5, rights, 40, clip_high=0.5) for name, seed in (("d", 0), ("e", 1))]
    assert compared(first, again, *begun_elsewhere)[1]["difference_interval"] == "Welch's t, unpaired, 2 and 2 seeds"
    one, two = compared(first, other)
    assert two["difference_interval"] == "paired by 8 questions"
    assert (two["difference"], *ends(two, "difference")) == paired_difference(3, 1, 2, 2)


@pytest.mark.parametrize(
    ("settings", "labels"),
    [
        ({"clip_high": 0.5, "kl_coef": 0.1}, ["clip_high=0.35, kl_coef=0.0", "clip_high=0.5, kl_coef=0.1"]),
        ({"name": "other"}, ["algorithm.name=ssr", "algorithm.name=other"]),  # run.name ends so, too
        ({"clip_high": "x", "kl_coef": "x", "alpha": "x", "learning_rate": "x"}, ["a", "b"]),  # too many to name
        ({"stall_s": 1.0}, ["a and 1 more"]),  # nothing that a run learns from
    ],
)
def test_a_row_is_called_what_differs(tmp_path, settings, labels):
    """Settings by the last part of their keys, where that is clear; what a run does not learn from is no difference."""
    if "name" in settings:
        folder = run_of(tmp_path / "b", {6: 0.5})
        text = (folder / "config.yaml").read_text()
        (folder / "config.yaml").write_text(text.replace("  name: ssr\n", "  name: other\n"))
    else:
        run_of(tmp_path / "b", {6: 0.5}, **settings)
    assert [row["label"] for row in compared(run_of(tmp_path / "a", {6: 0.5}), tmp_path / "b")] == labels


def test_a_label_shows_no_more_than_text(tmp_path):
    """Control characters of another's settings do not reach the terminal."""
    a, b = run_of(tmp_path / "a", {6: 0.5}), run_of(tmp_path / "b", {6: 0.5}, preset='"\\e[2J\\u202e"')
    assert [row["label"] for row in compared(a, b)][1] == "preset=?[2J?"


def test_the_files(tmp_path):
    """Markdown is the table and what it means; CSV has every number in full, with its interval and which that is."""
    records = compared(
        run_of(tmp_path / "a", {0: 0.25, 6: 0.5}), run_of(tmp_path / "b", {0: 0.25, 6: 0.625}, clip_high=0.5)
    )
    text = write_comparison(records, tmp_path / "t.md").read_text()
    lines = text.splitlines()
    assert lines[0].startswith("| Run | seeds | start | last | best | difference | tokens to 0.500 |")
    assert lines[2].startswith("| clip\\_high=0.35 | 0 | 0.250 (0.071 to 0.591; Wilson, 8 questions) | 0.500 (")
    assert "| +0.125 (-0.303 to +0.496; unpaired, 8 and 8 questions) |" in lines[3]
    assert all(note in text for note in NOTES) and "too high by chance" in text
    with write_comparison(records, tmp_path / "t.csv").open() as file:
        _, row = csv.DictReader(file)
    assert (
        float(row["difference_low"]) == records[1]["difference_low"] and row["last_interval"] == "Wilson, 8 questions"
    )
    assert "signific" not in text.lower()


def test_the_command_prints_and_writes_it(tmp_path, monkeypatch, capsys, no_figures):
    """Of several runs the command prints the table before the page's path, and the page has it; of one it does not.
    FILE.md and FILE.csv are the table alone."""
    monkeypatch.chdir(tmp_path)
    run_of(tmp_path / "a", {0: 0.25, 6: 0.5})
    run_of(tmp_path / "b", {0: 0.25, 6: 0.625}, clip_high=0.5)
    assert cli.main(["report", "a", "b", "--output", "both.html"]) == 0
    printed = capsys.readouterr().out
    assert "clip_high=0.5 " in printed and "+0.125 (-0.303 to +0.496" in printed
    assert printed.endswith("\n\nboth.html\n") and max(map(len, printed.split(NOTES[0])[0].splitlines())) <= 160
    html = (tmp_path / "both.html").read_text()
    assert (
        "+0.125 (-0.303\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}+0.496; unpaired" in html and "too high by chance" in html
    )
    for name in ("t.md", "t.csv"):
        assert cli.main(["report", "a", "b", "--output", name]) == 0
        assert capsys.readouterr().out == f"{name}\n" and "clip" in (tmp_path / name).read_text()
    assert cli.main(["report", "a", "b", "--output", "gone/t.md"]) == 2
    assert "gone/t.md cannot be written" in capsys.readouterr().err
    assert cli.main(["report", "a"]) == 0
    assert (
        capsys.readouterr().out == "a/report.html\n"
        and 'id="comparison"' not in (tmp_path / "a/report.html").read_text()
    )


def test_the_page_of_stages_given_twice_has_no_table(tmp_path, no_figures):
    """A stage that another run goes on from is no run of its own, so there is nothing to compare."""
    first = run_of(tmp_path / "one", {0: 0.25, 6: 0.5})
    second = run_of(tmp_path / "two", {0: 0.5, 6: 0.625}, model=first / "checkpoints" / "best")
    assert 'id="comparison"' not in write_report([first, second], tmp_path / "page.html").read_text()
