"""The paper's ablation at small scale, at equal sampled tokens and judged on a test split that nothing is tuned on.

    python -m benchmarks.ablation [--tasks sums easy_vqa few_sums] [--parts methods replay ...] [--seeds 0 1 2 3 4]
                                  [--tokens N] [--jobs 2] [--report] [--out FOLDER]

Every method trains in two stages, as the paper does. The first is a share of the budget with the task's recipe, the
second is a run of its own from the first one's last checkpoint, with the recipe of the second stage, for the rest. In
the full method the second stage forces rethinking. All others take the same second stage with rethink.fraction=0, so
the optimizer and replay begin anew in theirs, too. All responses have the second stage's room. A seed is also the
warm-up's: methods that are compared by seed start from the same model, and another seed from another one. The first
run that needs a model makes it, and others that need it wait. A run is known by its settings, its
seed, its budget and the run it starts from, and the same run is never done twice: the full method and SSR share their
first stage, so what is between them is forced rethinking alone. The budget is of sampled tokens, with the second passes
that are thrown away. A stage ends with the episode that reaches its share; what the first stage sampled beyond it is
taken from the second.

Each run answers the test questions greedily before its first step, after its last, and now and then between, for the
curve over tokens. Nothing follows from these answers: the policy that counts is the last one, never the best.

The parts `losses`, `two_rewards`, `sampling` and `draws` put the shipped losses and rules beside GRPO. Each has its
preset's settings where there is one, and otherwise the task's own: learning rate, clip values and all. Nothing was
tuned for any of them, so a loss that is behind may only want another learning rate. `draws` is for the task `few_sums`:
which questions come again matters where they are so few that they do.

Writes <out>/<gpu or cpu>/ablation.json and .md after every run, and at the end the paper's figures 2, 5, 6 and 7 and
the differences to GRPO of the four parts above, by default below --runs; `--out benchmarks/results` replaces what is
published. Tables that were not asked for stay there, each with its own budget; one that was asked for is replaced by
what is done of it. An ablation that was interrupted goes on where it stopped; the runs themselves stay in --runs. A run
that fails stops none but those that start from it; it is reported at the end, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet

from benchmarks.ablation_figures import draw_figures, rethinking_accuracies
from benchmarks.ablation_methods import METHODS, PARTS, RETHINKING, RULES, TASKS, Method, Settings
from benchmarks.ablation_runs import Job, UnfinishedError, run_all
from benchmarks.ablation_summary import REFERENCES, joined, stage_result, summarise, tables
from benchmarks.command_line import positive
from benchmarks.machine import cores, describe
from rethinker.config import ConfigError
from rethinker.embedded import own_files
from rethinker.embedded.files import as_files, model_folder
from rethinker.runtime import distributed
from rethinker.runtime.files import whole_file
from rethinker.settings import flat, resolve_config

FIRST_SHARE = 0.6
"""Share of the tokens that the first stage samples."""
SHARED: dict[str, Any] = {
    # More steps than any budget allows: the learning rate rises over the first 4, then follows the tokens.
    **{"train.max_steps": 4000, "train.warmup_ratio": 0.001},
    **{"checkpoint.every": 20, "checkpoint.keep": 1, "run.trackers": [], "run.save_completions": False},
}
VALIDATED_QUERIES = 512
"""The test questions are asked whenever so many queries were trained on, whatever an episode's length is."""
NOT_LEARNED = ("run.", "checkpoint.", "resume", "policy.model", "validation.every")
"""Settings that do not say what a run learns; the run that a second stage starts from stands for its model."""


@dataclass(frozen=True)
class Stage:
    """One run: its recipe and what it changes; `train.max_generated_tokens` counts the stage before it, too."""

    name: str
    recipe: str
    settings: Settings
    few: int
    """That of the task."""
    before: Stage | None = None


@functools.cache
def stages(task: str, method: Method, seed: int, tokens: int, questions: int) -> tuple[Stage, Stage]:
    """Both runs of a method. Equal names are equal runs."""
    share = max(1, round(FIRST_SHARE * tokens))
    recipes = TASKS[task].recipes
    room = max(_resolved(recipe)["rollout.max_new_tokens"] for recipe in recipes)  # for a first and a second answer
    asked: dict[str, Any] = {"data.validation": TASKS[task].test, "validation.size": questions}
    asked["rollout.max_new_tokens"] = room
    if few := TASKS[task].few:
        asked |= {"data.train": f"{task}_{few}.parquet", "data.category_weights": {}}
    shared = SHARED | asked | method.both
    seeds = {"seed": seed, "policy.warmup.seed": seed}
    first = _stage(task, recipes[0], {**shared, **seeds, "train.max_generated_tokens": share}, method.both, None)
    # Another seed: the second stage is not to begin with the questions of the first.
    own = {**shared, **method.second, "seed": seed + 1000, "train.max_generated_tokens": tokens}
    return first, _stage(task, recipes[1], own, method.both | method.second, first)


def _stage(task: str, recipe: str, settings: Settings, varied: Settings, before: Stage | None) -> Stage:
    """The run, named after what is varied and by a hash of all settings it learns from, whether a recipe, a default or
    the command line says so, and of the warm-up's code. Settings that are off (null, false, 0, empty) do not count: a
    name outlives a new one."""
    episode = settings.get("train.episode_queries", _resolved(recipe)["train.episode_queries"])
    settings = {**settings, "validation.every": max(1, VALIDATED_QUERIES // episode)}
    values = flat(resolve_config(recipe, {**settings, "run.name": "any"}))
    learned = {key: value for key, value in values.items() if value and not key.startswith(NOT_LEARNED)}
    known = json.dumps([learned, before.name if before else _demo_code()], sort_keys=True)
    words = [
        f"{key.rpartition('.')[2]}{len(values[key]) if isinstance(values[key], list) else values[key]}"
        for key in varied
        if key != "algorithm.name" and values[key] != _resolved(recipe)[key]
    ]
    number, seed = (2, settings["seed"] - 1000) if before else (1, settings["seed"])
    words = [task, values["algorithm.name"], *words, f"stage{number}", f"seed{seed}"]
    name = "-".join([*words, hashlib.sha256(known.encode()).hexdigest()[:8]])
    return Stage(name, recipe, settings, TASKS[task].few, before)


@functools.cache
def _demo_code() -> str:
    """A hash of the code and texts that make data sets and warm-up: others make other models to start from."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in own_files())).hexdigest()


@functools.cache
def _resolved(recipe: str) -> dict[str, Any]:
    return flat(resolve_config(recipe, {"run.name": "any"}))


def _few_questions(stage: Stage, runs: Path) -> Path:
    """The file of a task's few questions, below the runs."""
    file, data = runs / stage.settings["data.train"], resolve_config(stage.recipe, {"run.name": "any"}).data
    table = parquet.read_table(as_files(data, "train").train)
    left = Counter({category: round(stage.few * weight) for category, weight in data.category_weights.items()})
    chosen = []
    for category in table["category"].to_pylist():
        left[category] -= 1
        chosen.append(left[category] >= 0)
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as partial:
        parquet.write_table(table.filter(pa.array(chosen)), partial)
    return file


def _warmed_up(stage: Stage) -> str:
    """The model that the recipe starts from, which has been warmed up on all questions."""
    warmed = {"run.name": "any", "policy.warmup.seed": stage.settings["policy.warmup.seed"]}
    return model_folder(resolve_config(stage.recipe, warmed), distributed.ALONE)


def training(stage: Stage, runs: Path, jobs: dict[str, Job]) -> Job:
    """The job of a run and, before it in `jobs`, of the run that it starts from."""
    if stage.name in jobs:
        return jobs[stage.name]
    before = training(stage.before, runs, jobs) if stage.before else None
    folder = runs / stage.name
    tokens = stage.settings["train.max_generated_tokens"]

    def left() -> int:
        sampled = json.loads(before.done.read_text())["generated_tokens"] if before else 0
        return max(1, tokens - sampled)

    def command() -> list[str]:
        settings = {**stage.settings, "train.max_generated_tokens": left(), "run.dir": str(runs)}
        if before:
            settings["policy.model"] = str(runs / before.name / "checkpoints" / "last")
        if stage.few:
            settings["data.train"] = str(_few_questions(stage, runs))
            settings["policy.model"] = settings.get("policy.model") or _warmed_up(stage)
        settings |= {"run.name": stage.name, "resume": "auto"}
        given = [
            text
            for key, value in settings.items()
            for text in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
        ]
        return [sys.executable, "-m", "rethinker", "train", stage.recipe, *given]

    def finish() -> None:
        result = stage_result(folder)
        if result["generated_tokens"] < left():
            raise UnfinishedError(f"it ended after {result['generated_tokens']} of {left()} sampled tokens")
        _write(folder / "ablation.json", json.dumps({**result, "machine": describe()}))

    jobs[stage.name] = Job(stage.name, folder / "ablation.json", command, finish, before)
    return jobs[stage.name]


def evaluating(task: str, trained: Job, mode: str, questions: int, runs: Path) -> Job:
    """The job that asks a run's last checkpoint the test questions in a mode of `rethinker eval`."""
    run, output = runs / trained.name, runs / trained.name / f"eval-{mode}"

    def command() -> list[str]:
        shutil.rmtree(output, ignore_errors=True)  # of an evaluation that was interrupted
        asked = ["--benchmark", TASKS[task].benchmark, "--mode", mode, "--limit", str(questions)]
        checkpoint = str(run / "checkpoints" / "last")
        return [sys.executable, "-m", "rethinker", "eval", checkpoint, *asked, "--output", str(output)]

    def finish() -> None:
        if not (output / "result.json").is_file():
            raise UnfinishedError(f"it left no {output / 'result.json'}")

    return Job(f"{trained.name}-eval-{mode}", output / "result.json", command, finish, trained)


@dataclass(frozen=True)
class Ablation:
    """What is asked for: which tables, on which tasks, with which seeds and budgets."""

    tasks: Sequence[str]
    parts: Sequence[str]
    seeds: Sequence[int]
    tokens: int | None
    questions: int
    runs: Path

    def budget(self, task: str) -> int:
        """Sampled tokens of every method on this task."""
        return self.tokens or TASKS[task].tokens

    def both(self, task: str, method: Method, seed: int) -> tuple[Stage, Stage]:
        """Both runs of a method with a seed."""
        return stages(task, method, seed, self.budget(task), self.questions)

    def jobs(self) -> list[Job]:
        """Every run once. Seeds come first, so that an ablation that was interrupted has whole seeds to compare."""
        jobs: dict[str, Job] = {}
        for seed in self.seeds:
            for task in self.tasks:
                for method in (method for part in self.parts for method in PARTS.get(part, {}).values()):
                    training(self.both(task, method, seed)[1], self.runs, jobs)
                for name, modes in RETHINKING.items() if "rethinking" in self.parts else ():
                    trained = training(self.both(task, METHODS[name], seed)[1], self.runs, jobs)
                    for mode in modes:
                        job = evaluating(task, trained, mode, self.questions, self.runs)
                        jobs[job.name] = job
        return list(jobs.values())

    def results(self, task: str, method: Method) -> list[dict[str, Any]]:
        """Of every seed with which both runs of the method are done: what they learned."""
        found = []
        for seed in self.seeds:
            files = [self.runs / stage.name / "ablation.json" for stage in self.both(task, method, seed)]
            if all(file.is_file() for file in files):
                both = [json.loads(file.read_text()) for file in files]
                machines = [result["machine"] for result in both if "machine" in result]  # older runs do not say
                found.append({"seed": seed, "machines": machines, **joined(*both)})
        return found

    def rethinking(self, task: str) -> tuple[list[int], list[dict[str, Any]]]:
        """The seeds whose evaluations are all done, and figure 7's accuracies over them."""
        asked = [(name, mode) for name, modes in RETHINKING.items() for mode in modes]
        done, found = [], []
        for seed in self.seeds:
            second = {name: self.both(task, METHODS[name], seed)[1].name for name in RETHINKING}
            own = [(name, mode, self.runs / second[name] / f"eval-{mode}") for name, mode in asked]
            if all((folder / "result.json").is_file() for _, _, folder in own):
                done.append(seed)
                found += own
        return done, rethinking_accuracies(found, self.results(task, METHODS["SSR"])[0]["by_category"]) if done else []

    def table(self, task: str, part: str) -> dict[str, Any]:
        """What is done of one table, how, and on which machines and versions."""
        shared = {"task": task, "part": part, "tokens": self.budget(task), "first_stage": FIRST_SHARE}
        shared |= {"questions": self.questions}
        if part == "rethinking":
            seeds, rows = self.rethinking(task)
            asked = [result for name in RETHINKING for result in self.results(task, METHODS[name])]
            machines = _machines(result for result in asked if result["seed"] in seeds)
            return {**shared, "machines": machines, "seeds": seeds, "rows": rows}
        known = PARTS[part] if "GRPO" in PARTS[part] else METHODS
        references = {name: self.results(task, known[name]) for name in REFERENCES if name in known}
        done = {name: self.results(task, method) for name, method in PARTS[part].items()}
        machines = _machines(chain.from_iterable([*done.values(), *references.values()]))
        rows = [{"method": name, **summarise(own, references, self.budget(task))} for name, own in done.items() if own]
        return {**shared, "machines": machines, "rows": rows}

    def report(self, folder: Path, figures: bool) -> str:
        """Write ablation.json and .md, in which a table of which nothing is done stays as it was, and the figures of
        the tables asked for, if asked to; all tables as text."""
        known = [*PARTS, "rethinking"]
        file, asked = folder / "ablation.json", [(t, p) for t in self.tasks for p in known if p in self.parts]
        written = json.loads(file.read_text(encoding="utf-8")).get("tables", []) if file.is_file() else []
        kept = {(table["task"], table["part"]): table for table in written}
        kept |= {key: table for key in asked if (table := self.table(*key))["rows"]}
        content = [kept[task, part] for task in TASKS for part in known if (task, part) in kept]
        text = tables(content)
        folder.mkdir(parents=True, exist_ok=True)
        _write(file, json.dumps({"tables": content}, indent=2) + "\n")
        _write(folder / "ablation.md", text)
        for task in self.tasks if figures else ():
            own = METHODS if "methods" in self.parts else {}
            done = {name: found for name, method in own.items() if (found := self.results(task, method))}
            rethinking = self.rethinking(task)[1] if "rethinking" in self.parts else []
            rows = {part: kept[task, part]["rows"] for part in RULES if part in self.parts and (task, part) in kept}
            rows = {part: own for part, own in rows.items() if len(own) > 1 and own[0]["method"] == "GRPO"}
            draw_figures(task, done, rethinking, rows, folder)
        return text


def _machines(results: Iterable[Mapping[str, Any]]) -> list[Any]:
    """Each machine and version that trained one of them, once."""
    found: list[Any] = []
    for machine in (machine for result in results for machine in result["machines"]):
        if machine not in found:
            found.append(machine)
    return found


def _write(file: Path, text: str) -> None:
    with whole_file(file) as partial:
        partial.write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, parts = parser.add_argument, [*PARTS, "rethinking"]
    add("--tasks", nargs="+", choices=TASKS, default=[name for name, task in TASKS.items() if not task.few])
    add("--parts", nargs="+", choices=parts, default=parts, help="a table each; rethinking is figure 7")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    budgets = ", ".join(f"{name} {task.tokens}" for name, task in TASKS.items())
    add("--tokens", type=positive, help=f"sampled tokens of every method, both stages together [{budgets}]")
    add("--questions", type=positive, default=2000, help="most test questions [%(default)s]")
    add("--jobs", type=positive, default=2, help="runs at a time, which share the cores [%(default)s]")
    add("--report", action="store_true", help="run nothing: write tables and figures of the runs that are done")
    add("--runs", type=Path, default=Path("runs/ablation"))
    add("--out", type=Path, help="folder of tables and figures [RUNS/results]")
    args = parser.parse_args(argv)
    seeds = list(dict.fromkeys(args.seeds))
    ablation = Ablation(args.tasks, args.parts, seeds, args.tokens, args.questions, args.runs.absolute())
    try:
        jobs = ablation.jobs()
    except ConfigError as error:
        parser.error(str(error))
    folder = (args.out or args.runs / "results") / (describe()["gpu"] or "cpu").replace(" ", "-").lower()
    failed = {}
    if not args.report:
        done = sum(job.done.is_file() for job in jobs)

        def finished(job: Job) -> None:
            nonlocal done
            done += 1
            print(f"{done} of {len(jobs)}: {job.name}", flush=True)
            ablation.report(folder, figures=False)

        try:
            failed = run_all(jobs, args.jobs, max(1, cores() // args.jobs), args.runs / "logs", finished)
        except KeyboardInterrupt:
            print("interrupted; the same command goes on where this one stopped", file=sys.stderr)
            return 130
    print(ablation.report(folder, figures=True))
    for name, problem in failed.items():
        print(f"{name}: {problem}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what runs is stopped, as at Ctrl-C
    raise SystemExit(main())
