"""The ablation's plan, and the whole of it. Small processes stand for the training runs."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest

from benchmarks import ablation
from benchmarks.ablation import Ablation, stages
from benchmarks.ablation_methods import METHODS, PARTS, PRESETS, RULES, Method, Task
from benchmarks.ablation_runs import UnfinishedError
from rethinker.evaluation.settings import flat_settings
from rethinker.settings import flat, presets, read_yaml_file, resolve_config
from tests.benchmarks.test_ablation_summary import CATEGORIES, METRICS, write_run


def names(task: str, method, seed: int = 0, tokens: int = 1000, questions: int = 100) -> tuple[str, str]:
    first, second = stages(task, method, seed, tokens, questions)
    return first.name, second.name


class TestPlan:
    def test_equal_settings_are_the_same_run(self):
        """What tables share is run once, and the full method and SSR part after their first stage."""
        full, ssr = names("easy_vqa", METHODS["full"]), names("easy_vqa", METHODS["SSR"])
        assert full[0] == ssr[0] and full[1] != ssr[1]
        assert names("easy_vqa", PARTS["replay"]["SSR"]) == ssr
        assert names("easy_vqa", PARTS["forced"]["forced 0.0"]) == ssr
        assert names("easy_vqa", PARTS["forced"]["forced 0.25"]) == full
        different = [*METHODS.values(), *PARTS["replay"].values(), *PARTS["episode_512"].values()]
        assert len({names("easy_vqa", method)[1] for method in different}) == 4 + 5 + 4  # SSR and GRPO are in two

    def test_seed_budget_and_questions_make_another_run_and_folders_do_not(self, tmp_path):
        base = names("easy_vqa", METHODS["SSR"])
        for changed in ({"seed": 1}, {"tokens": 2000}, {"questions": 50}):
            assert not set(names("easy_vqa", METHODS["SSR"], **changed)) & set(base)
        plans = [Ablation(["easy_vqa"], ["methods"], [0], 1000, 100, tmp_path / place) for place in "ab"]
        assert [job.name for job in plans[0].jobs()] == [job.name for job in plans[1].jobs()]
        assert base[0].startswith("easy_vqa-ssr-stage1-seed0-")

    def test_a_recipe_that_changes_is_another_run_and_one_that_moves_is_not(self, tmp_path, monkeypatch):
        texts = {
            "a": "base: easy_vqa_cpu",
            "moved": "base: easy_vqa_cpu",
            "lr": "base: easy_vqa_cpu\ntrain: {betas: [0.8, 0.9]}",
        }
        found = {}
        for name, text in texts.items():
            (tmp_path / f"{name}.yaml").write_text(text)
            recipes = (str(tmp_path / f"{name}.yaml"), "easy_vqa_cpu_stage2")
            monkeypatch.setitem(ablation.TASKS, "easy_vqa", Task(recipes, "easy_vqa", "easy_vqa", 1000))
            found[name] = names("easy_vqa", Method({"algorithm.name": "ssr"}))
        assert found["a"] == found["moved"]
        assert found["a"][0] != found["lr"][0] and found["a"][1] != found["lr"][1]  # it starts from the other one

    def test_another_warmup_makes_other_runs(self, tmp_path, monkeypatch):
        """Runs that start from another model are not those that are done, in both stages."""

        def names() -> set[str]:
            for cached in (ablation.stages, ablation._demo_code):
                cached.cache_clear()
            return {stage.name for stage in ablation.stages("sums", METHODS["GRPO"], 0, 1000, 10)}

        before = names()
        for changed in ("sums.py", "common_texts.json"):
            folder = tmp_path / changed
            folder.mkdir()
            copies = [Path(shutil.copy(file, folder)) for file in ablation.own_files()]
            with monkeypatch.context() as patch:
                patch.setattr(ablation, "own_files", lambda copies=copies: copies)
                assert names() == before
                (folder / changed).write_text("another")
                assert len(before) == 2 and not before & names()
        assert names() == before

    def test_a_seed_has_a_model_of_its_own_that_all_methods_start_from(self):
        """Two warm-ups of the same settings differ: intervals over seeds have to hold for that, too."""
        for seed in (0, 4):
            firsts = [stages("sums", method, seed, 1000, 100)[0] for part in PARTS.values() for method in part.values()]
            models = [resolve_config(run.recipe, run.settings).policy.warmup for run in firsts]
            assert models[0].seed == seed and all(model == models[0] for model in models)

    def test_forcing_from_the_start_is_the_same_in_both_stages(self):
        both = stages("sums", PARTS["forced"]["forced 0.25, from the start"], 0, 1000, 100)
        first, second = (resolve_config(run.recipe, run.settings).rethink for run in both)
        assert first == second and first.fraction == 0.25

    def test_methods_differ_in_what_their_names_say_alone(self):
        """In each stage the same room, questions, seeds and budget; no method but the full one forces rethinking."""
        told = ["algorithm.name", *(f"replay.{name}" for name in ("alpha", "importance_exponent", "unit"))]
        told += ["replay.clear_every_episode", "replay.max_age", "train.episode_queries", "validation.every"]
        told += ["rollout.group_size", "train.batch_pairs", "train.learning_rate"]
        told += [f"rethink.{name}" for name in ("fraction", "first_answers", "mask_first_answer")]
        told += [key for part in RULES for method in PARTS[part].values() for key in method.both]
        for number in (0, 1):
            runs = [
                stages("easy_vqa", method, 3, 1000, 100)[number] for part in PARTS.values() for method in part.values()
            ]
            assert len({run.recipe for run in runs}) == 1
            rest = [{k: v for k, v in run.settings.items() if k not in told} for run in runs]
            assert all(settings == rest[0] for settings in rest)
        forced = {name: stages("easy_vqa", method, 3, 1000, 100) for name, method in METHODS.items()}
        fractions = {
            name: [resolve_config(run.recipe, run.settings).rethink.fraction for run in both]
            for name, both in forced.items()
        }
        assert fractions == {"full": [0.0, 0.25], "SSR": [0.0, 0.0], "filter": [0.0, 0.0], "GRPO": [0.0, 0.0]}

    def test_losses_differ_from_grpo_in_the_algorithm_alone(self):
        """Each has its preset's values, the same sampling as GRPO, and settings of its own. Needs the presets and
        settings of every loss."""
        both = {name: stages("sums", method, 0, 1000, 100) for name, method in PARTS["losses"].items()}
        values = {
            name: flat(resolve_config(run.recipe, run.settings | {"run.name": "x"})) for name, (run, _) in both.items()
        }
        for name, found in values.items():
            changed = {key for key in found if found[key] != values["GRPO"][key]}
            assert all(key.startswith("algorithm.") for key in changed) and found["algorithm.name"] == "grpo"
            assert bool(changed) == (name != "GRPO")
        assert len({run.name for run, _ in both.values()}) == len(both) == 13
        for preset, name in {**PRESETS, "reinforce_pp": "REINFORCE++"}.items():
            own = flat(resolve_config(f"sums_cpu+{preset}", {"run.name": "x", "algorithm.name": "grpo"}))
            algorithm = {key: value for key, value in own.items() if key.startswith("algorithm.")}
            assert {key: values[name][key] for key in algorithm} == algorithm
        assert values["clip-higher of DAPO"]["algorithm.clip_high"] == 0.28

    def test_rules_of_sampling_are_those_of_their_names(self):
        """No two are one run; learning rate, loss and clips are GRPO's. Needs the settings of every rule."""
        both = {name: stages("sums", method, 0, 1000, 100) for name, method in PARTS["sampling"].items()}
        assert len({run.name for run, _ in both.values()}) == len(both) == 11
        loss = ("algorithm.loss", "algorithm.clip", "algorithm.aggregation", "algorithm.advantage_", "train.")
        (dapo,) = (run for name, (run, _) in both.items() if name.startswith("DAPO"))
        assert flat_settings(read_yaml_file(presets()["dapo"], "dapo")).items() <= dapo.settings.items()
        rules = [run for run, _ in both.values() if run is not dapo]
        values = [flat(resolve_config(run.recipe, run.settings | {"run.name": "x"})) for run in rules]
        shared = [{key: value for key, value in found.items() if key.startswith(loss)} for found in values]
        assert all(found == shared[0] for found in shared)

    def test_two_rewards_are_given_to_both_but_for_one_setting(self):
        by_sum, by_each = (PARTS["two_rewards"][f"{name}, format reward 0.2"].both for name in ("GRPO", "GDPO"))
        assert by_each == by_sum | {"algorithm.advantages_per_reward": True}

    def test_seeds_come_first_and_no_job_twice(self, tmp_path):
        jobs = Ablation(["easy_vqa"], [*PARTS, "rethinking"], [4, 2], 1000, 100, tmp_path).jobs()
        assert len({job.name for job in jobs}) == len(jobs)
        seeds = ["seed4" in job.name for job in jobs]
        assert seeds == sorted(seeds, reverse=True) and 0 < sum(seeds) < len(seeds)
        for number, job in enumerate(jobs):
            assert job.after is None or job.after in jobs[:number]


TRAINER = """#!{python} -IS
# Stands for Python with the trainer and `rethinker eval`: 100 tokens a step until the budget is spent.
import json, os, shutil, sys
_, _, command, what, *given = sys.argv[1:]
settings = dict(zip(given[::2], given[1::2]))
with open("{folder}/calls", "a") as calls:
    calls.write(json.dumps([command, what, settings]) + "\\n")
if command == "eval":
    os.makedirs(settings["--output"])
    shutil.copy("{folder}/responses.parquet", settings["--output"])
    open(settings["--output"] + "/result.json", "w").write("{{}}")
    sys.exit()
name = settings["--algorithm.name"]
if os.path.exists("{folder}/broken-" + name):
    sys.exit("the disk is full")
run = os.path.join(settings["--run.dir"], settings["--run.name"])
os.makedirs(run, exist_ok=True)
budget, rows = int(settings["--train.max_generated_tokens"]), []
while not rows or rows[-1]["generated_tokens"] < budget:
    rows.append({metrics} | {{"step": len(rows) + 1, "generated_tokens": 130 * (len(rows) + 1)}})
start = 0.4 if "--policy.model" in settings else 0.3
ends = [(0, start), (len(rows), start + {{"ssr": 0.2, "filter": 0.15, "grpo": 0.1}}[name])]
held_out = [{{"step": s, "val_accuracy": a, "by_category": {categories}, "questions": 8}} for s, a in ends]
for file, lines in (("metrics", rows), ("validation", held_out)):
    open(f"{{run}}/{{file}}.jsonl", "w").write("".join(json.dumps(line) + "\\n" for line in lines))
"""


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Replaces the trainer; a function that gives the command, the recipe and the settings of each call so far."""
    trainer = tmp_path / "python"
    trainer.write_text(TRAINER.format(python=sys.executable, folder=tmp_path, metrics=METRICS, categories=CATEGORIES))
    trainer.chmod(0o755)
    monkeypatch.setattr(ablation.sys, "executable", str(trainer))
    monkeypatch.setattr(ablation, "describe", lambda: {"gpu": None})
    answers = {"category": ["2 terms", "3 terms"] * 2, "reward": [1.0, 0.0, 1.0, 1.0], "rethinks": [True, False] * 2}
    pd.DataFrame(answers).to_parquet(tmp_path / "responses.parquet")
    return lambda: [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]


class TestWhole:
    def main(self, tmp_path: Path, *more: str) -> int:
        places = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
        return ablation.main(["--tasks", "easy_vqa", "--seeds", "0", "--tokens", "1000", *places, *more])

    def tables(self, tmp_path: Path) -> list[dict]:
        return json.loads((tmp_path / "out" / "cpu" / "ablation.json").read_text())["tables"]

    def test_from_nothing_to_tables_and_figures(self, tmp_path, calls):
        assert self.main(tmp_path, "--parts", "methods", "rethinking", "--seeds", "0", "1") == 0
        found = calls()
        trained = [settings for command, _, settings in found if command == "train"]
        assert len(trained) == 2 * (3 + 4) and len(found) == len(trained) + 2 * 4
        for settings in trained:
            assert settings["--resume"] == "auto" and settings["--data.validation"] == "easy_vqa"
            # The first stage stops at 650 of 600 tokens, which the second makes up for.
            second = "--policy.model" in settings
            assert settings["--train.max_generated_tokens"] == ("350" if second else "600")
            if second:
                own, first = settings["--run.name"], Path(settings["--policy.model"])
                assert first.parts[-2:] == ("checkpoints", "last") and "stage1" in first.parts[-3]
                assert first.parts[-3].split("-")[1] == own.split("-")[1] and own.split("-")[-2] in first.parts[-3]
        table, figure_7 = self.tables(tmp_path)
        assert figure_7["part"] == "rethinking" and figure_7["tokens"] == 1000 and figure_7["seeds"] == [0, 1]
        in_all = figure_7["rows"][-1]
        assert in_all["category"] == "all" and in_all["baseline"] == in_all["rethinking forced"] == 0.75
        rows = {row["method"]: row for row in table["rows"]}
        assert list(rows) == list(METHODS) and (table["tokens"], table["questions"]) == (1000, 2000)
        assert rows["GRPO"]["accuracies"] == pytest.approx([0.5, 0.5])
        assert rows["full"]["minus"]["GRPO"]["mean"] == pytest.approx(0.1)
        assert rows["full"]["share_of_grpos_tokens"] < rows["GRPO"]["share_of_grpos_tokens"] == pytest.approx(1.0)
        text = (tmp_path / "out" / "cpu" / "ablation.md").read_text()
        assert "| filter | 0.550" in text and "| all | 0.750 | 0.750 | 0.750 | 0.750 | 0.500 |" in text
        figures = {path.name for path in (tmp_path / "out" / "cpu").glob("*.svg")}
        assert figures == {
            f"ablation_easy_vqa_{name}.svg" for name in ("effective_queries", "curves", "advantages", "rethinking")
        }

    def test_figure_7_alone(self, tmp_path, calls):
        """The other figures would be of those methods alone that it needs."""
        assert self.main(tmp_path, "--parts", "rethinking") == 0
        assert [path.name for path in (tmp_path / "out" / "cpu").glob("*.svg")] == ["ablation_easy_vqa_rethinking.svg"]
        assert [table["part"] for table in self.tables(tmp_path)] == ["rethinking"]

    @pytest.mark.parametrize("bad", ["--jobs 0", "--jobs -1", "--tokens 0", "--questions 0.5"])
    def test_numbers_that_cannot_be(self, bad, tmp_path, calls, capsys):
        with pytest.raises(SystemExit):
            self.main(tmp_path, *bad.split())
        assert f"{bad.split()[0]}: '{bad.split()[1]}' is not a whole number" in capsys.readouterr().err

    def test_a_seed_that_cannot_be(self, tmp_path, calls, capsys):
        with pytest.raises(SystemExit):
            self.main(tmp_path, "--seeds", "-1")
        assert "seed=-1" in capsys.readouterr().err.splitlines()[-1]

    def test_a_seed_that_is_named_twice_counts_once(self, tmp_path, calls):
        """Twice the same number has an interval of 0."""
        assert self.main(tmp_path, "--parts", "replay", "--seeds", "3", "3") == 0
        (table,) = self.tables(tmp_path)
        assert all(row["seeds"] == [3] for row in table["rows"])

    def test_a_try_leaves_the_published_results_alone(self, tmp_path, calls):
        """Where no folder is named, tables and figures go to the runs."""
        options = "--tasks easy_vqa --seeds 0 --tokens 1000 --parts replay --runs".split()
        assert ablation.main([*options, str(tmp_path / "own")]) == 0
        assert (tmp_path / "own" / "results" / "cpu" / "ablation.md").is_file()

    def test_a_table_with_grpo_of_its_own_is_compared_with_that(self, tmp_path, calls):
        """In groups of 2 SSR is compared with GRPO in groups of 2, of which the methods' table knows nothing."""
        assert self.main(tmp_path, "--parts", "groups_of_2", "forced") == 0
        rows = {(table["part"], row["method"]): row for table in self.tables(tmp_path) for row in table["rows"]}
        assert rows["groups_of_2", "SSR"]["minus"]["GRPO"]["seeds"] == 1
        assert "full" not in rows["groups_of_2", "SSR"]["minus"]
        # Nothing of the methods' table has run but SSR, which forces none, and the full method.
        against = rows["forced", "forced 0.5"]["minus"]
        assert against["GRPO"] is None and against["full"]["seeds"] == 1 and against["SSR"]["seeds"] == 1
        assert "| SSR |" in (tmp_path / "out" / "cpu" / "ablation.md").read_text()

    def test_a_report_replaces_its_own_tables_alone(self, tmp_path, calls, monkeypatch):
        """Runs of another table can be elsewhere, and of another machine, version and budget: it says so itself, and
        stays; so do the figures of the methods."""
        assert self.main(tmp_path, "--parts", "methods") == 0
        (tmp_path / "runs").rename(tmp_path / "elsewhere")
        figures = {path: path.read_text() for path in (tmp_path / "out" / "cpu").glob("*.svg")}
        another = {"gpu": None, "commit": "another"}
        monkeypatch.setattr(ablation, "describe", lambda: another)
        assert self.main(tmp_path, "--parts", "replay", "--tokens", "2000") == 0
        said = [
            (table["part"], table["tokens"], table["machines"], len(table["rows"])) for table in self.tables(tmp_path)
        ]
        assert said == [("methods", 1000, [{"gpu": None}], 4), ("replay", 2000, [another], 7)]
        text = (tmp_path / "out" / "cpu" / "ablation.md").read_text()
        assert text.index("1,000 tokens") < text.index("2,000 tokens")
        assert figures and {path: path.read_text() for path in (tmp_path / "out" / "cpu").glob("*.svg")} == figures

    def test_a_table_names_the_machines_of_its_runs(self, tmp_path, calls, monkeypatch):
        """Not the one that writes the report; each once; with those of the runs that it compares with."""

        def machines() -> dict[str, list]:
            return {table["part"]: table["machines"] for table in self.tables(tmp_path)}

        first, later = {"gpu": None}, {"gpu": None, "commit": "later"}
        assert self.main(tmp_path, "--parts", "forced") == 0
        monkeypatch.setattr(ablation, "describe", lambda: later)
        assert self.main(tmp_path, "--parts", "forced", "--report") == 0 and machines() == {"forced": [first]}
        assert self.main(tmp_path, "--parts", "methods", "rethinking") == 0
        assert machines()["methods"] == [first, later] and machines()["rethinking"] == [first]
        assert self.main(tmp_path, "--parts", "forced", "replay") == 0
        assert machines()["forced"] == [first, later]  # for GRPO
        assert machines()["replay"] == [later, first]  # SSR is that of the first table

    def test_runs_that_do_not_name_their_machine(self, tmp_path, calls):
        """They were made before runs did so."""
        assert self.main(tmp_path, "--parts", "episode_64") == 0
        for file in (tmp_path / "runs").glob("*/ablation.json"):
            file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "machine"}))
        assert self.main(tmp_path, "--parts", "episode_64", "--report") == 0
        (table,) = self.tables(tmp_path)
        assert table["machines"] == [] and len(table["rows"]) == 2

    def test_a_report_of_another_form_is_replaced(self, tmp_path, calls):
        (tmp_path / "out" / "cpu").mkdir(parents=True)
        (tmp_path / "out" / "cpu" / "ablation.json").write_text('{"summary": []}')
        assert self.main(tmp_path, "--parts", "replay") == 0
        assert [table["part"] for table in self.tables(tmp_path)] == ["replay"]

    def test_a_second_time_nothing_is_run(self, tmp_path, calls):
        assert self.main(tmp_path, "--parts", "methods") == 0
        before = calls()
        assert self.main(tmp_path, "--parts", "methods", "--report") == 0 and calls() == before
        assert self.main(tmp_path, "--parts", "methods") == 0 and calls() == before
        # What another table shares is not run again either: SSR and the full method are there.
        assert self.main(tmp_path, "--parts", "forced") == 0
        new = [settings for _, _, settings in calls()[len(before) :]]
        assert len(new) == 3 + 2  # 0.1, 0.5 and the wrong ones in the second stage; from the start in both

    def test_a_run_that_fails_is_reported_and_the_next_call_goes_on(self, tmp_path, calls, capsys):
        (tmp_path / "broken-filter").touch()
        assert self.main(tmp_path, "--parts", "methods") == 1
        said = capsys.readouterr().err
        assert said.count("exit code 1") == 1 and "the disk is full" in said and said.count("was not started") == 1
        table = (tmp_path / "out" / "cpu" / "ablation.md").read_text()
        assert "| GRPO |" in table and "| filter |" not in table
        (tmp_path / "broken-filter").unlink()
        before = len(calls())
        assert self.main(tmp_path, "--parts", "methods") == 0
        assert {settings["--algorithm.name"] for _, _, settings in calls()[before:]} == {"filter"}
        assert "| filter |" in (tmp_path / "out" / "cpu" / "ablation.md").read_text()

    def test_an_interrupted_ablation_goes_on(self, tmp_path, calls, capsys, monkeypatch):
        """After Ctrl-C at the third run, the runs that were done by then are not run again."""
        report, reports = Ablation.report, []

        def third(self, *given, **named):
            reports.append(given)
            if len(reports) == 3:
                raise KeyboardInterrupt
            return report(self, *given, **named)

        monkeypatch.setattr(Ablation, "report", third)
        assert self.main(tmp_path, "--parts", "methods", "--jobs", "1") == 130
        assert "goes on" in capsys.readouterr().err
        before = len(calls())
        assert before == 3
        assert self.main(tmp_path, "--parts", "methods") == 0
        assert len(calls()) == 3 + 4

    def test_few_questions_are_a_file_and_start_from_the_same_model(self, tmp_path, calls, monkeypatch):
        """The first 26 of each category for each 1 of its weight, drawn as one set, in both stages."""
        monkeypatch.setattr(ablation, "_warmed_up", lambda stage: f"warm-up {stage.settings['policy.warmup.seed']}")
        assert self.main(tmp_path, "--tasks", "few_sums", "--parts", "draws", "--seeds", "3") == 0
        found = [settings for _, _, settings in calls()]
        (file,) = {settings["--data.train"] for settings in found}
        ids = pd.read_parquet(file)["id"].tolist()
        weights = {2: 1, 3: 1, 4: 2, 5: 3, 6: 3}
        assert ids == [f"sums/train/{terms}/{n}" for terms, weight in weights.items() for n in range(26 * weight)]
        assert {settings["--data.category_weights"] for settings in found} == {"{}"}
        models = [settings["--policy.model"] for settings in found]
        assert models.count("warm-up 3") == 3 and len(set(models)) == 4 and len(found) == 6
        (table,) = self.tables(tmp_path)
        assert (table["task"], table["part"]) == ("few_sums", "draws") and len(table["rows"]) == 3
        figures = {path.name for path in (tmp_path / "out" / "cpu").glob("*.svg")}
        assert figures == {"ablation_few_sums_draws.svg"}

    def test_a_run_that_was_stopped_early_is_not_done(self, tmp_path):
        jobs = {}
        second = stages("easy_vqa", METHODS["SSR"], 0, 1000, 100)[1]
        first = ablation.training(second, tmp_path, jobs).after
        write_run(tmp_path / first.name, 5, {0: 0.3})
        with pytest.raises(UnfinishedError, match="500 of 600"):
            first.finish()
        assert not first.done.exists()
