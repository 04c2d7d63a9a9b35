"""Runs side by side in numbers: a row per configuration, with 95% intervals, and its difference to the first row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from rethinker.config import ConfigError
from rethinker.evaluation.intervals import (
    difference_of_means,
    mean_interval,
    paired_difference,
    unpaired_difference,
    wilson_interval,
)
from rethinker.report.configurations import Configuration, configurations, seeds_of
from rethinker.report.measures import Measures, last_verdicts, mean_curve, measure, tokens_to
from rethinker.report.runs import RunRecord
from rethinker.report.summary import markdown

Record = dict[str, Any]
MEANS = ("start", "last", "best", "reward", "steps", "tokens", "step_s", "tokens_per_s", "effective", "length")
"""Of `Measures.numbers`."""
NO_INTERVAL = "no interval: two runs of one seed"


def compare_runs(runs: Sequence[RunRecord]) -> list[Record]:
    """A record for each configuration: its label, runs and seeds, the means over its runs, and `_low`, `_high` and
    `_interval` (which it is, over how many) of `start`, `last` and `difference`. What is not known is missing."""
    rows = [(own, [measure(run) for run in own.runs]) for own in configurations(runs)]
    first = [one for one in rows[0][1] if "last" in one.numbers]
    records = []
    for number, (own, measured) in enumerate(rows):
        record: Record = {"label": own.label, "runs": " ".join(run.name for run in own.runs), "seeds": _seeds(own)}
        for name in MEANS:
            if values := [one.numbers[name] for one in measured if name in one.numbers]:
                record[name] = fmean(values)
        for name in ("start", "last"):
            record |= _interval(name, [one for one in measured if name in one.numbers])
        validated = [one for one in measured if "last" in one.numbers]
        if first and validated and number:
            record |= _difference(first, validated)
        if first and all(len(one.curve) > 1 for one in measured):
            level = fmean(one.numbers["last"] for one in first)
            reached = tokens_to(*mean_curve([one.curve for one in measured]), level=level)
            record |= {"level": level, "tokens_to_level": "not reached" if reached is None else reached}
        records.append(record)
    return records


def _seeds(own: Configuration) -> str:
    return ", ".join(str([*run.earlier, run][0].settings.get("seed", "")) for run in own.runs)


def _interval(name: str, measured: Sequence[Measures]) -> Record:
    """Of a mean over seeds Student's t; of one run Wilson's over its questions, where their number is known."""
    values = [one.numbers[name] for one in measured]
    if len(values) > 1 and _twice(measured):
        return {f"{name}_interval": NO_INTERVAL}
    if len(values) > 1:
        mean, half = mean_interval(values)
        return _ends(name, mean - half, mean + half, f"t, {len(values)} seeds")
    if not values or name not in measured[0].questions:
        return {}
    n = measured[0].questions[name]
    return _ends(name, *wilson_interval(round(values[0] * n), n), f"Wilson, {n} questions")


def _twice(measured: Sequence[Measures]) -> bool:
    """Whether two runs have the same seeds, and so are no two samples of what a seed does."""
    return len({seeds_of(one.run) for one in measured}) < len(measured)


def _ends(name: str, low: float, high: float, kind: str) -> Record:
    return {f"{name}_low": low, f"{name}_high": high, f"{name}_interval": kind}


def _difference(first: Sequence[Measures], measured: Sequence[Measures]) -> Record:
    """The last accuracy minus the first row's: paired by seed or by question where these are the same."""
    before, after = ([one.numbers["last"] for one in row] for row in (first, measured))
    counts = sorted((len(before), len(after)))
    if counts == [1, 1]:
        return _of_two_runs(first[0], measured[0])
    if counts[0] == 1:
        return {
            "difference": fmean(after) - fmean(before),
            "difference_interval": "no interval: one seed against several",
        }
    if _twice(first) or _twice(measured):
        return {"difference": fmean(after) - fmean(before), "difference_interval": NO_INTERVAL}
    theirs, ours = ({seeds_of(one.run): one.numbers["last"] for one in row} for row in (first, measured))
    common = [seeds for seeds in ours if seeds in theirs]
    if len(common) > 1:
        mean, half = mean_interval([ours[seeds] - theirs[seeds] for seeds in common])
        kind = f"t, paired by {len(common)} seeds"
    else:
        mean, half = difference_of_means(before, after)
        kind = f"Welch's t, unpaired, {len(before)} and {len(after)} seeds"
    return {"difference": mean, **_ends("difference", mean - half, mean + half, kind)}


def _of_two_runs(first: Measures, second: Measures) -> Record:
    """By question where both were asked the same ones; else as of two samples of questions."""
    verdicts = last_verdicts(first), last_verdicts(second)
    if all(verdicts) and verdicts[0][0] == verdicts[1][0] and len(verdicts[0][1]) == len(verdicts[1][1]):
        before, after = (right for _, right in verdicts)
        cells = Counter(zip(before, after, strict=True))
        difference, low, high = paired_difference(*(cells[b, a] for b in "10" for a in "10"))
        return {"difference": difference, **_ends("difference", low, high, f"paired by {len(before)} questions")}
    n = [one.questions.get("last") for one in (first, second)]
    values = [one.numbers["last"] for one in (first, second)]
    if not all(n):
        return {"difference": values[1] - values[0], "difference_interval": "no interval: number of questions unknown"}
    difference, low, high = unpaired_difference(round(values[0] * n[0]), n[0], round(values[1] * n[1]), n[1])
    other = all(verdicts) or n[0] != n[1]
    kind = f"unpaired, {n[0]} and {n[1]}{' other' if other else ''} questions"
    return {"difference": difference, **_ends("difference", low, high, kind)}


def comparison(records: Sequence[Record]) -> pd.DataFrame:
    """The records as a table of text; a column that no run can fill is left out."""
    level = next((f"{record['level']:.3f}" for record in records if "level" in record), "")
    rows = [
        {
            "seeds": record["seeds"],
            "start": _with_interval(record, "start", "{:.3f}"),
            "last": _with_interval(record, "last", "{:.3f}"),
            "best": _number(record, "best", "{:.3f}"),
            "difference": _with_interval(record, "difference", "{:+.3f}"),
            f"tokens to {level}": _tokens(record, "tokens_to_level"),
            "sampled tokens": _tokens(record, "tokens"),
            "steps": _number(record, "steps", "{:.4g}"),
            "reward": _number(record, "reward", "{:.3f}"),
            "effective queries": _number(record, "effective", "{:.2f}"),
            "response length": _number(record, "length", "{:.1f}"),
            "s a step": _number(record, "step_s", "{:.2f}"),
            "tokens a second": _number(record, "tokens_per_s", "{:.4g}"),
        }
        for record in records
    ]
    table = pd.DataFrame(rows, index=[record["label"] for record in records])
    return table.loc[:, table.ne("").any()].rename_axis(columns="Run")


NOTES = (
    "start, last and best are greedy held-out accuracies. The best one is the highest of several looks at the same "
    "questions: it is too high by chance, and has no interval.",
    "Intervals are of 95%. Student's t and Welch's are over runs with other seeds. Wilson's of one run, and those of "
    "two runs by their questions (Newcombe's), do not say what another seed would do.",
    "The difference is in the last accuracy, to the first row. Tokens to a level are those sampled until the accuracy, "
    "as the nearest curve that never falls, is the first row's last one.",
    "Reward and response length are of the last tenth of the steps, effective queries of all steps. Seconds are the "
    "median step's; tokens a second are all sampled tokens over the seconds of all steps.",
)


def as_text(records: Sequence[Record], width: int) -> str:
    """What the terminal shows: the table in lines of at most so many characters, and what it means."""
    return "\n".join([comparison(records).to_string(line_width=width), "", *NOTES])


def write_comparison(records: Sequence[Record], output: Path) -> Path:
    """Write the table as Markdown, or by the suffix .csv all numbers of the records in full.

    Raises:
        ConfigError: it cannot be written.
    """
    if output.suffix == ".csv":
        text = pd.DataFrame(records).to_csv(index=False)
    else:
        text = "\n\n".join([markdown(comparison(records)), *NOTES]) + "\n"
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {output} cannot be written: {error.strerror or error}") from None
    return output


def _number(record: Record, name: str, form: str) -> str:
    return form.format(record[name]) if name in record else ""


def _with_interval(record: Record, name: str, form: str) -> str:
    """The number, its interval, and which it is."""
    ends = (
        [f"{form} to {form}".format(record[f"{name}_low"], record[f"{name}_high"])] if f"{name}_low" in record else []
    )
    known = "; ".join([*ends, *([record[f"{name}_interval"]] if f"{name}_interval" in record else [])])
    return _number(record, name, form) + (f" ({known})" if known else "")


def _tokens(record: Record, name: str) -> str:
    """A number of tokens in thousands or millions."""
    tokens = record.get(name, "")
    if isinstance(tokens, str):
        return tokens
    size, unit = next((pair for pair in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if tokens >= pair[0]), (1, ""))
    return f"{tokens / size:.4g}{unit}"
