"""The rethinking analysis: what rethinking adds per benchmark, from the results of `rethinker eval` (METHOD).

A result.json holds model, benchmark, mode (normal, forced or oracle), accuracy and rethink_ratio (0 to 1), and more
that is not drawn.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rethinker.config import ConfigError
from rethinker.report.drawing import COLORS, MARKERS, label_of, new_figure
from rethinker.report.figures import WIDTH

MODES = {"normal": "as it is", "forced": "rethinking forced", "oracle": "forced where wrong (upper bound)"}


@dataclass(frozen=True)
class Evaluation:
    """One model on one benchmark in one mode."""

    model: str
    benchmark: str
    mode: str
    accuracy: float
    questions: int | None
    rethink_ratio: float | None


@dataclass(frozen=True)
class Comparison:
    """The evaluations by what they are compared with: the model trained without forced rethinking."""

    baseline: str
    trained: list[str]
    """Other models: those trained with forced rethinking."""
    benchmarks: list[str]
    """Those on which the baseline's normal accuracy is known and above zero."""
    results: dict[tuple[str, str, str], Evaluation]
    """By (model, benchmark, mode)."""

    def improvement(self, model: str, benchmark: str, mode: str) -> float:
        """Relative improvement over the baseline's normal mode, in per cent; NaN where it was not evaluated."""
        result = self.results.get((model, benchmark, mode))
        normal = self.results[self.baseline, benchmark, "normal"].accuracy
        return 100 * (result.accuracy / normal - 1) if result else math.nan

    def bars(self) -> list[tuple[str, str, str]]:
        """(label, model, mode) of each bar of a benchmark, those that some benchmark has."""
        bars = [(MODES[mode], self.baseline, mode) for mode in ("forced", "oracle")]
        several = len(self.trained) > 1
        bars += [("trained with it" + (f": {_short(m)}" if several else ""), m, "normal") for m in self.trained]
        return [bar for bar in bars if any((bar[1], name, bar[2]) in self.results for name in self.benchmarks)]


def read_evaluations(folders: Sequence[str | Path]) -> list[Evaluation]:
    """Every result.json in these folders, or below them.

    Raises:
        ConfigError: a folder holds none, or a file is not to the schema.
    """
    files: dict[Path, None] = {}
    for folder in folders:
        found = [Path(folder) / "result.json"] if (Path(folder) / "result.json").is_file() else []
        found = found or sorted(Path(folder).rglob("result.json"))
        if not found:
            raise ConfigError(f"--eval {folder} holds no result.json; name a folder that `rethinker eval` wrote")
        files |= dict.fromkeys(path.resolve() for path in found)
    return [_read(file) for file in files]


def _read(file: Path) -> Evaluation:
    try:
        row = json.loads(file.read_text("utf-8"))
        ratio, questions = row.get("rethink_ratio"), row.get("questions")
        result = Evaluation(
            str(row["model"]),
            str(row["benchmark"]),
            str(row["mode"]),
            float(row["accuracy"]),
            len(questions) if isinstance(questions, list) else questions,
            None if ratio is None else float(ratio),
        )
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise ConfigError(f"--eval: {file} is no result of `rethinker eval`: {error}") from None
    except KeyError as error:
        raise ConfigError(f"--eval: {file} is no result of `rethinker eval`: it lacks {error}") from None
    if result.mode not in MODES:
        raise ConfigError(f"--eval: {file} has mode {result.mode!r}; known are {', '.join(MODES)}")
    return result


def compare(evaluations: Sequence[Evaluation]) -> Comparison | None:
    """Find the baseline: the only model with forced or oracle results, or else the first one given.

    Where every benchmark has a pair of models of its own, one with such results and one without, the pairs are compared
    as if they were one, by what they are.

    Returns:
        None where the baseline has no normal result above zero.
    """
    evaluations = _by_role(evaluations)
    results = {(e.model, e.benchmark, e.mode): e for e in evaluations}
    models = list(dict.fromkeys(e.model for e in evaluations))
    probed = list(dict.fromkeys(e.model for e in evaluations if e.mode != "normal"))
    if not models:
        return None
    baseline = probed[0] if len(probed) == 1 else models[0]
    benchmarks = [
        e.benchmark for e in results.values() if e.model == baseline and e.mode == "normal" and e.accuracy > 0
    ]
    trained = [model for model in models if model != baseline]
    return Comparison(baseline, trained, benchmarks, results) if benchmarks else None


def _by_role(evaluations: Sequence[Evaluation]) -> Sequence[Evaluation]:
    """With several baselines and one pair of models per benchmark: the same results, models named by their roles."""
    probed = {(e.benchmark, e.model) for e in evaluations if e.mode != "normal"}
    models: dict[str, set[str]] = {}
    for e in evaluations:
        models.setdefault(e.benchmark, set()).add(e.model)
    pairs = all(len(m) == 2 and sum((name, x) in probed for x in m) == 1 for name, m in models.items())
    if len({model for _, model in probed}) < 2 or not pairs:
        return evaluations
    names = {True: "without forced rethinking", False: "with forced rethinking"}
    return [replace(e, model=names[(e.benchmark, e.model) in probed]) for e in evaluations]


def rethinking_analysis(comparison: Comparison) -> Any | None:
    """Bars of relative improvement per benchmark; as a line, how often the trained model rethinks of its own accord.

    Returns:
        The figure; None where nothing is there to compare with the baseline.
    """
    bars = comparison.bars()
    if not bars:
        return None
    figure = new_figure(WIDTH, 3.8)
    axes = figure.subplots()
    places = np.arange(len(comparison.benchmarks))
    width = 0.8 / len(bars)
    for number, (label, model, mode) in enumerate(bars):
        heights = [comparison.improvement(model, name, mode) for name in comparison.benchmarks]
        at = places + (number - (len(bars) - 1) / 2) * width
        drawn = axes.bar(at, heights, width * 0.92, color=COLORS[number % len(COLORS)], label=label_of(label))
        texts = ["" if math.isnan(height) else f"{height:+.0f}" for height in heights]
        axes.bar_label(drawn, texts, fontsize=7.5, padding=1)
    axes.axhline(0, color="#555555", linewidth=0.8)
    axes.set_xticks(places, [label_of(name) for name in comparison.benchmarks])
    if len(places) > 3:
        axes.tick_params(axis="x", rotation=25)
    axes.set_ylabel("relative improvement, %")
    axes.margins(y=0.15)
    _draw_ratios(axes, comparison, places)
    figure.legend(loc="outside upper left", ncols=2, fontsize=8.5, frameon=False, handlelength=1.4)
    return figure


def _draw_ratios(axes: Any, comparison: Comparison, places: np.ndarray) -> None:
    """The spontaneous rethinking ratio, on an axis of its own at the right."""
    lines = {}
    for model in comparison.trained or [comparison.baseline]:
        found = [comparison.results.get((model, name, "normal")) for name in comparison.benchmarks]
        ratios = [math.nan if e is None or e.rethink_ratio is None else 100 * e.rethink_ratio for e in found]
        if not all(map(math.isnan, ratios)):
            lines[model] = ratios
    if not lines:
        return
    right = axes.twinx()
    for number, (model, ratios) in enumerate(lines.items()):
        label = "rethinks by itself, %" + (f": {_short(model)}" if len(lines) > 1 else "")
        look = {"color": COLORS[6], "marker": MARKERS[number % len(MARKERS)], "linewidth": 1.4, "markersize": 5}
        right.plot(places, ratios, label=label_of(label), **look)
    right.set_ylim(0, 105)
    right.set_ylabel("responses that rethink unforced, %")


def _short(model: str) -> str:
    """What tells a model apart: a checkpoint of a run by the run's name."""
    parts = Path(model).parts
    return parts[-3] if len(parts) > 2 and parts[-2] == "checkpoints" else parts[-1] if parts else model
