"""The paper's ablation at small scale: GRPO, filter, SSR, and SSR with forced rethinking, at equal sampled tokens.

    python -m benchmarks.ablation [--tasks easy_vqa digits] [--seeds 0 1 2] [--tokens N]

Every run starts from the same model, samples until its budget of tokens is spent, and is judged by greedy accuracy on
held-out questions. Writes benchmarks/results/<gpu or cpu>/ablation.json and .md: means over seeds with 95% intervals,
and differences from the full method paired by seed. A run that is complete is not run again, so an interrupted ablation
goes on where it stopped. The runs themselves stay in --runs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.machine import describe

RESULTS = Path(__file__).parent / "results"

RETHINK = ["--algorithm.name", "ssr", "--rethink.fraction", "0.25"]
METHODS: dict[str, list[str]] = {
    "full (SSR + forced rethinking)": RETHINK,
    "without forced rethinking (SSR)": ["--algorithm.name", "ssr"],
    "filter only": ["--algorithm.name", "filter"],
    "plain GRPO": ["--algorithm.name", "grpo"],
}
"""In the order of the paper's table."""

AVERAGED = (
    *("accuracy_before", "steps", "generated_tokens", "advantage_abs_mean"),
    *("effective_query_ratio_last_quarter", "rethink_ratio_last_quarter", "rethink_kept"),
)

TASKS: dict[str, list[str]] = {
    "easy_vqa": [],
    # One image a question: reading digits. Comparing and adding them takes the tiny model a far longer warm-up.
    "digits": [
        *("--data.train", "digits", "--data.validation", "digits", "--validation.size", "2520"),
        *("--data.category_weights", '{"read": 1}'),
    ],
}
"""Settings over the recipe easy_vqa_cpu."""

CATEGORY = {"digits": "read"}
"""Where only a category is trained, accuracy is of that category."""

TOKENS = {"easy_vqa": 250_000, "digits": 140_000}
"""Sampled tokens of a run: about 55 steps of plain GRPO."""

# The same room for everyone: a first answer, a trigger and a second one. All else is the recipe's.
SHARED = ["--rollout.max_new_tokens", "72", "--validation.every", "1000"]
# More steps than the budget of tokens allows; the learning rate rises over the first 4.
SHARED += ["--train.max_steps", "400", "--train.warmup_ratio", "0.01"]


def run(task: str, method: str, seed: int, tokens: int, runs: Path, model: str | None) -> dict[str, Any]:
    """One training run, or the result that it left; accuracy, effective queries and rethinking of it."""
    name = f"{task}-{list(METHODS).index(method)}-{seed}-{tokens}"
    done = runs / name / "ablation.json"
    if done.exists():
        return json.loads(done.read_text())
    shutil.rmtree(runs / name, ignore_errors=True)  # an interrupted one
    command = [sys.executable, "-m", "rethinker", "train", "easy_vqa_cpu", "--run.dir", str(runs), "--run.name", name]
    command += ["--seed", str(seed), "--train.max_generated_tokens", str(tokens)]
    command += [*SHARED, *TASKS[task], *METHODS[method], *(["--policy.model", model] if model else [])]
    log = (runs / f"{name}.log").open("w")
    subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    rows = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
    held_out = [json.loads(line) for line in (runs / name / "validation.jsonl").read_text().splitlines()]
    last = rows[-max(1, len(rows) // 4) :]

    def mean(metric: str, some: list[dict[str, Any]]) -> float:
        return statistics.fmean(row[metric] for row in some)

    def accuracy(row: dict[str, Any]) -> float:
        return row["by_category"][CATEGORY[task]] if task in CATEGORY else row["val_accuracy"]

    result = {
        "task": task,
        "method": method,
        "seed": seed,
        "steps": rows[-1]["step"],
        "generated_tokens": rows[-1]["generated_tokens"],
        "trained_pairs": sum(row["trained_pairs"] for row in rows),
        "accuracy_before": accuracy(held_out[0]),
        "accuracy": accuracy(held_out[-1]),
        "by_category": held_out[-1]["by_category"],
        "questions": held_out[-1]["questions"],
        "reward_last_quarter": mean("reward_mean", last),
        "effective_query_ratio_last_quarter": mean("effective_query_ratio", last),
        "rethink_ratio_last_quarter": mean("rethink_ratio", last),
        "rethink_kept": mean("rethink_kept", rows),
        "rethink_fixed": mean("rethink_fixed", rows),
        "rethink_broken": mean("rethink_broken", rows),
        "advantage_abs_mean": mean("advantage_abs_mean", rows),
        "step_s": mean("step_s", rows),
    }
    done.write_text(json.dumps(result))
    return result


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of its 95% interval (Student's t); the half-width of a single value is NaN."""
    from scipy.stats import t

    if len(values) < 2:
        return values[0], float("nan")
    error = statistics.stdev(values) / len(values) ** 0.5
    return statistics.fmean(values), float(t.ppf(0.975, len(values) - 1)) * error


def summarise(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per task and method: mean accuracy with its interval, and the difference from the full method by seed."""
    full = next(iter(METHODS))
    by_key = {(r["task"], r["method"], r["seed"]): r for r in results}
    rows = []
    for task in dict.fromkeys(r["task"] for r in results):
        for method in METHODS:
            mine = [r for r in results if (r["task"], r["method"]) == (task, method)]
            if not mine:
                continue
            mean, half = interval([r["accuracy"] for r in mine])
            pairs = [(r, by_key.get((task, full, r["seed"]))) for r in mine]
            differences = [r["accuracy"] - f["accuracy"] for r, f in pairs if f is not None and method != full]
            difference = interval(differences) if differences else None
            averages = {name: statistics.fmean(r[name] for r in mine) for name in AVERAGED}
            rows.append(
                {"task": task, "method": method, "seeds": len(mine), "accuracy": mean, "accuracy_95": half}
                | {"difference_from_full": difference and difference[0], "difference_95": difference and difference[1]}
                | averages
            )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The summary as Markdown, in the form of the paper's ablation."""
    lines = [
        "| task | method | accuracy | difference from full | effective queries, end | own rethinking | steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        difference = (
            ""
            if row["difference_from_full"] is None
            else f"{row['difference_from_full']:+.3f} ± {row['difference_95']:.3f}"
        )
        lines.append(
            f"| {row['task']} | {row['method']} | {row['accuracy']:.3f} ± {row['accuracy_95']:.3f} | {difference} | "
            f"{row['effective_query_ratio_last_quarter']:.2f} | {row['rethink_ratio_last_quarter']:.3f} | "
            f"{row['steps']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, help=f"sampled tokens per run, instead of {TOKENS}")
    parser.add_argument("--model", action="append", metavar="TASK=FOLDER", default=[], help="start from this model")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    args.runs.mkdir(parents=True, exist_ok=True)
    models = dict(entry.split("=", 1) for entry in args.model)
    machine = describe()
    folder = args.out / ("cpu" if machine["gpu"] is None else machine["gpu"].replace(" ", "-").lower())
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    # Seeds outermost: an interrupted ablation has whole seeds to compare.
    for seed in args.seeds:
        for task in args.tasks:
            for method in METHODS:
                results.append(run(task, method, seed, args.tokens or TOKENS[task], args.runs, models.get(task)))
                print(f"{task:10} {method:34} seed {seed}: {results[-1]['accuracy']:.3f}", flush=True)
    results.sort(key=lambda r: (args.tasks.index(r["task"]), list(METHODS).index(r["method"]), r["seed"]))
    rows = summarise(results)
    report = {
        "machine": machine,
        "tokens": {task: args.tokens or TOKENS[task] for task in args.tasks},
        "shared": SHARED,
        "summary": rows,
        "runs": results,
    }
    (folder / "ablation.json").write_text(json.dumps(report, indent=2) + "\n")
    (folder / "ablation.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
