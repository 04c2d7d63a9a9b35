"""What one run learned and what it took, as numbers: accuracies, tokens, seconds, over all its stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from rethinker.report.runs import RunRecord

Curve = Sequence[Sequence[float]]
"""(sampled tokens, held-out accuracy) in order."""


@dataclass(frozen=True)
class Measures:
    """The numbers of one run; one that it does not have is missing."""

    run: RunRecord
    numbers: dict[str, float]
    """`start`, `last` and `best` held-out accuracy (at step 0, at the end, the highest), mean sampled `reward` and
    response `length` of the last tenth of the steps, `steps`, sampled `tokens`, median seconds of a step (`step_s`),
    sampled `tokens_per_s` of all steps, and the mean share of `effective` queries."""
    questions: dict[str, int]
    """How many were asked for `start` and `last`."""
    curve: list[tuple[float, float]]
    """Sampled tokens and accuracy at each validation."""


def measure(run: RunRecord) -> Measures:
    """The numbers of a run."""
    accuracy, tokens, seconds = run.series("val_accuracy"), sampled_tokens(run), run.series("step_s")
    ends = ({"start": 0} if 0 in accuracy else {}) | ({"last": accuracy.index[-1]} if len(accuracy) else {})
    asked = {row["step"]: row.get("questions") for row in run.validations}
    tenth = max(1, len(run.steps) // 10)
    total = tokens.iloc[-1] if len(tokens) else np.nan
    found = {
        **{name: accuracy[step] for name, step in ends.items()},
        "best": accuracy.max(),
        "reward": run.series("reward_mean").iloc[-tenth:].mean(),
        "steps": run.metrics.index.max(),
        "tokens": total,
        "step_s": seconds.median(),
        "tokens_per_s": total / seconds.sum() if seconds.sum() else np.nan,
        "effective": run.series("effective_query_ratio").mean(),
        "length": run.series("response_length_mean").iloc[-tenth:].mean(),
    }
    return Measures(
        run,
        numbers={name: float(value) for name, value in found.items() if not np.isnan(value)},
        questions={name: asked[step] for name, step in ends.items() if _is_count(asked.get(step))},
        curve=[(tokens[step], value) for step, value in accuracy.items() if step in tokens],
    )


def _is_count(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number > 0


def sampled_tokens(run: RunRecord) -> pd.Series:
    """Tokens sampled until each step, from 0 at step 0, those of earlier stages included; empty where a stage did not
    count them."""
    counted, parts = run.series("generated_tokens"), [pd.Series({0: 0.0})]
    for start, end in zip((0, *run.joins), (*run.joins, np.inf), strict=True):
        own = counted[(counted.index > start) & (counted.index <= end)]
        if own.empty:
            return pd.Series(dtype=float)
        parts.append(own + parts[-1].iloc[-1])
    return pd.concat(parts)


def mean_curve(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [101], to where all curves came, and their mean accuracy there, as the nearest curve that never falls
    (isotonic regression): the first of many noisy points above a level would come too early."""
    from scipy.optimize import isotonic_regression

    tokens = np.linspace(0, min(curve[-1][0] for curve in curves), 101)
    means = np.mean([np.interp(tokens, *np.transpose(curve)) for curve in curves], axis=0)
    return tokens, isotonic_regression(means).x


def tokens_to(tokens: np.ndarray, accuracies: np.ndarray, level: float) -> float | None:
    """Tokens after which a curve that never falls is at this accuracy; None where it never is."""
    if accuracies[-1] < level:
        return None
    after = int(np.argmax(accuracies >= level))
    if after == 0:
        return 0.0
    low, high = accuracies[after - 1], accuracies[after]
    return float(tokens[after - 1] + (level - low) / (high - low) * (tokens[after] - tokens[after - 1]))


def last_verdicts(measures: Measures) -> tuple[str, str] | None:
    """What the last validation asked, and `1` or `0` for each question; None of a run that did not say it."""
    step = measures.run.series("val_accuracy").index[-1]
    row = next((row for row in reversed(measures.run.validations) if row["step"] == step), {})
    asked, right = row.get("asked"), row.get("right")
    if not (isinstance(asked, str) and isinstance(right, str) and asked and set(right) <= {"0", "1"}):
        return None
    return (asked, right) if len(right) == measures.questions.get("last") else None
