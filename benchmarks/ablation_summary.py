"""The numbers of the ablation: what a run and a method learned, means over seeds, and differences paired by seed."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t

from rethinker.evaluation.intervals import mean_interval
from rethinker.report.measures import mean_curve, tokens_to

Result = dict[str, Any]

PER_STEP = (
    *("generated_tokens", "reward_mean", "effective_query_ratio", "rethink_ratio", "response_length_mean"),
    *("rethink_forced", "rethink_kept", "rethink_fixed", "rethink_broken", "replay_fraction", "step_s"),
)
"""Metrics of metrics.jsonl that a result keeps for every step."""
START, END = 0.1, 0.75
"""`..._start` is the mean over the first tenth of a method's steps, `..._end` over its last quarter; of rethinking,
those of its second stage."""
AVERAGED = (
    *("accuracy_before", "accuracy_switch", "steps", "generated_tokens", "seconds", "reward_end"),
    *("effective_queries_start", "effective_queries_end", "rethinks_start", "rethinks_end"),
    *("response_length_start", "response_length_end"),
    *("rethink_forced", "rethink_kept", "rethink_fixed", "rethink_broken", "replayed"),
)
"""What the summary gives as a mean over the seeds, without an interval."""


def stage_result(folder: Path) -> Result:
    """What one run learned, from its folder: every step's metrics, and its accuracies by the tokens until then."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    held_out = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    tokens = {0: 0} | {row["step"]: row["generated_tokens"] for row in rows}
    return {
        "steps": len(rows),
        "generated_tokens": rows[-1]["generated_tokens"],
        "curve": [[tokens[row["step"]], row["val_accuracy"]] for row in held_out],
        "by_category": held_out[-1]["by_category"],
        "questions": held_out[-1]["questions"],
        "advantages": np.sum([row["advantage_histogram"] for row in rows], axis=0).tolist(),
        "per_step": {name: [row[name] for row in rows] for name in PER_STEP},
    }


def joined(first: Result, second: Result) -> Result:
    """What a method learned in both stages: steps and tokens go on counting."""
    offset = first["generated_tokens"]
    per_step = {name: first["per_step"][name] + second["per_step"][name] for name in PER_STEP}
    sampled = [tokens + offset for tokens in second["per_step"]["generated_tokens"]]
    per_step["generated_tokens"] = first["per_step"]["generated_tokens"] + sampled
    steps = first["steps"] + second["steps"]

    def start(name: str, rows: Mapping[str, Sequence[float]] = per_step) -> float:
        return statistics.fmean(rows[name][: max(1, round(START * len(rows[name])))])

    def end(name: str, rows: Mapping[str, Sequence[float]] = per_step) -> float:
        return statistics.fmean(rows[name][min(len(rows[name]) - 1, round(END * len(rows[name]))) :])

    def in_second(name: str) -> float:
        return statistics.fmean(second["per_step"][name])

    return {
        "accuracy_before": first["curve"][0][1],
        "accuracy_switch": second["curve"][0][1],
        "accuracy": second["curve"][-1][1],
        "by_category": second["by_category"],
        "questions": second["questions"],
        # Where the second stage begins the same model has answered twice.
        "curve": first["curve"] + [[tokens + offset, accuracy] for tokens, accuracy in second["curve"][1:]],
        "advantages": [a + b for a, b in zip(first["advantages"], second["advantages"], strict=True)],
        "per_step": per_step,
        "steps": steps,
        "generated_tokens": offset + second["generated_tokens"],
        "seconds": sum(per_step["step_s"]),
        "reward_end": end("reward_mean"),
        "effective_queries_start": start("effective_query_ratio"),
        "effective_queries_end": end("effective_query_ratio"),
        # Of the second stage, where rethinking is forced if it is.
        "rethinks_start": start("rethink_ratio", second["per_step"]),
        "rethinks_end": end("rethink_ratio", second["per_step"]),
        "response_length_start": start("response_length_mean"),
        "response_length_end": end("response_length_mean"),
        **{name: in_second(name) for name in PER_STEP if name.startswith("rethink_") and name != "rethink_ratio"},
        "replayed": statistics.fmean(per_step["replay_fraction"]),
    }


def difference(results: Sequence[Result], others: Sequence[Result], tokens: int | None = None) -> Result | None:
    """Mean of `results` minus `others` over the seeds that both have, with its 95% interval; None without any. The
    accuracies are the last ones, or with `tokens` those after so many."""
    ours, theirs = (
        {r["seed"]: r["accuracy"] if tokens is None else accuracy_after(tokens, r) for r in side}
        for side in (results, others)
    )
    gaps = [value - theirs[seed] for seed, value in ours.items() if seed in theirs]
    if not gaps:
        return None
    mean, half = mean_interval(gaps)
    return {"mean": mean, "half_95": half, "seeds": len(gaps)}


def accuracy_after(tokens: int, result: Result) -> float:
    """On the straight line between the answers before and after: a run ends with an episode, its tokens elsewhere."""
    return float(np.interp(tokens, *np.transpose(result["curve"])))


def share_of_tokens(results: Sequence[Result], others: Sequence[Result]) -> float | None:
    """Tokens after which `results` are as accurate as `others` are at their end, as a share of the others' tokens.

    None where they never are. Both are mean curves over the seeds that both have, so the share of `others` itself is 1,
    or less where it stood still at last.
    """
    both = {result["seed"] for result in results} & {result["seed"] for result in others}
    if not both:
        return None
    own, other = (
        mean_curve([result["curve"] for result in runs if result["seed"] in both]) for runs in (results, others)
    )
    reached = tokens_to(*own, level=other[1][-1])
    return None if reached is None else float(reached / other[0][-1])


def summarise(results: Sequence[Result], references: Mapping[str, Sequence[Result]], tokens: int) -> Result:
    """A method's row: mean accuracy, differences to the references by seed, that to GRPO after equally many tokens, and
    tokens to GRPO's final accuracy.

    Args:
        results: of the method, one per seed.
        references: of GRPO and, as far as they are compared, of the other REFERENCES.
        tokens: the budget.
    """
    mean, half = mean_interval([result["accuracy"] for result in results])
    categories = {name: [result["by_category"][name] for result in results] for name in results[0]["by_category"]}
    grpo = references["GRPO"]
    # By how much one seed changes it.
    without = [
        share_of_tokens([result for result in results if result["seed"] != seed], grpo)
        for seed in ([result["seed"] for result in results] if len(results) > 2 else ())
    ]
    return {
        "seeds": [result["seed"] for result in results],
        "accuracy": mean,
        "accuracy_half_95": half,
        "accuracies": [result["accuracy"] for result in results],
        "minus": {name: difference(results, others) for name, others in references.items()},
        "minus_grpo_at_budget": difference(results, grpo, tokens),
        "accuracies_at_budget": [accuracy_after(tokens, result) for result in results],
        "share_of_grpos_tokens": share_of_tokens(results, grpo),
        "share_without_one_seed": without,
        "by_category": {name: statistics.fmean(values) for name, values in categories.items()},
        **{name: statistics.fmean(result[name] for result in results) for name in AVERAGED},
    }


def pooled_interval(rows: Sequence[Result]) -> tuple[float, int] | None:
    """Half the width of the 95% interval of a difference between two methods after the same tokens, and its degrees of
    freedom, from what all methods deviate by that have the first one's seeds. None where that leaves none.

    A method's accuracy with a seed is taken as the method's mean plus the seed's effect, which all methods share (they
    start from its model), plus a deviation whose size is the same for all (randomised blocks).
    """
    same = [row for row in rows if row["seeds"] == rows[0]["seeds"]]
    table = np.array([row.get("accuracies_at_budget", row["accuracies"]) for row in same])  # tables of before have none
    methods, seeds = table.shape
    freedom = (methods - 1) * (seeds - 1)
    if not freedom:
        return None
    left = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()
    return float(t.ppf(0.975, freedom) * np.sqrt(2 * (left**2).sum() / freedom / seeds)), freedom


REFERENCES = ("full", "SSR", "GRPO")
COLUMNS = (
    *("method", "accuracy", *(f"minus {name}" for name in REFERENCES)),
    *("minus GRPO after the same tokens", "tokens to GRPO's accuracy"),
    *("effective queries", "rethinks unforced, stage 2", "tokens a response", "steps", "sampled tokens", "seeds"),
)


def tables(content: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table for each of `content`, which says its task, part, budget in sampled tokens, and rows: those of
    `summarise` with the method's name, or figure 7's accuracies by category."""
    return "\n".join(_figure_7(table) if table["part"] == "rethinking" else _methods(table) for table in content)


def _methods(table: Mapping[str, Any]) -> str:
    first, *_ = table["rows"]  # another one may lack seeds still
    before = [row["accuracy_before"] for row in table["rows"] if row["seeds"] == first["seeds"]]
    said = f"Every method samples {table['tokens']:,} tokens, and what ends the episode. "
    said += f"The accuracy before the first step is {before[0]:.3f}"
    if max(before) - min(before) > 0.005:  # greedy answers of the same model
        said += f", and up to {max(before) - min(before):.3f} apart: these runs did not start from the same model"
    if len(table["rows"]) > 2 and (pooled := pooled_interval(table["rows"])):
        said += ". By what all methods together deviate from their means and the seeds', a difference has "
        said += f"± {pooled[0]:.3f} ({pooled[1]} degrees of freedom)"
    cells = [_cells(row) for row in table["rows"]]
    filled = [place for place in range(len(COLUMNS)) if any(row[place] for row in cells)]
    shown = ([row[place] for place in filled] for row in cells)
    return _section(f"{table['task']}: {table['part']}", said, [COLUMNS[place] for place in filled], shown)


def _figure_7(table: Mapping[str, Any]) -> str:
    said = f"Accuracies of SSR's policies (and of the full method's) after {table['tokens']:,} tokens; seeds: "
    said += ", ".join(map(str, table["seeds"]))
    cells = ([name, *(f"{share:.3f}" for share in shares)] for name, *shares in (row.values() for row in table["rows"]))
    return _section(f"{table['task']}: rethinking (figure 7)", said, list(table["rows"][0]), cells)


def _section(title: str, said: str, columns: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *(f"| {' | '.join(row)} |" for row in cells)]
    return f"## {title}\n\n{said}.\n\n" + "\n".join(lines) + "\n"


def _cells(row: Mapping[str, Any]) -> list[str]:
    gaps = [*(row["minus"].get(name) for name in REFERENCES), row.get("minus_grpo_at_budget")]
    share, without = row["share_of_grpos_tokens"], row["share_without_one_seed"]
    reached = "not reached" if share is None else f"{share:.2f}"
    if row["minus"]["GRPO"] is None:
        reached = ""
    elif without:
        ends = [f"{min(found):.2f}" if (found := [s for s in without if s is not None]) else "never"]
        ends.append("never" if None in without else f"{max(without):.2f}")
        reached += f" ({ends[0]} to {ends[1]})"
    return [
        row["method"],
        f"{row['accuracy']:.3f}" + _half(row["accuracy_half_95"]),
        *("" if gap is None else f"{gap['mean']:+.3f}" + _half(gap["half_95"]) for gap in gaps),
        reached,
        f"{row['effective_queries_start']:.2f} to {row['effective_queries_end']:.2f}",
        f"{row['rethinks_start']:.3f} to {row['rethinks_end']:.3f}",
        f"{row['response_length_start']:.1f} to {row['response_length_end']:.1f}",
        f"{row['steps']:.0f}",
        f"{row['generated_tokens'] / 1000:.0f}k",
        str(len(row["seeds"])),
    ]


def _half(width: float | None) -> str:
    return "" if width is None else f" ± {width:.3f}"
