"""The rethinking analysis: what rethinking adds per benchmark, from the results of `rethinker eval`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rethinker.config import ConfigError
from rethinker.report.drawing import COLORS, MARKERS, label_of, new_figure
from rethinker.report.figures import WIDTH
from rethinker.report.summary import Table

if TYPE_CHECKING:
    import pandas as pd

MODES = {"normal": "as it is", "forced": "rethinking forced", "oracle": "forced where wrong (upper bound)"}


@dataclass(frozen=True)
class Comparison:
    """The evaluations by what they are compared with: the model trained without forced rethinking."""

    baseline: str
    trained: list[str]  # other models: those trained with forced rethinking
    benchmarks: list[str]  # those on which the baseline's normal accuracy is known and above zero
    results: pd.DataFrame  # accuracy and rethink_ratio (0 to 1) by (model, benchmark, mode)

    def value(self, model: str, benchmark: str, mode: str, column: str = "accuracy") -> float:
        """A result; NaN where it was not evaluated."""
        key = (model, benchmark, mode)
        return float(self.results.loc[key, column]) if key in self.results.index else math.nan

    def improvement(self, model: str, benchmark: str, mode: str) -> float:
        """Relative improvement over the baseline's normal mode, in per cent; NaN where it was not evaluated."""
        return 100 * (self.value(model, benchmark, mode) / self.value(self.baseline, benchmark, "normal") - 1)

    def bars(self) -> list[tuple[str, str, str]]:
        """(label, model, mode) of each bar of a benchmark, those that some benchmark has."""
        bars = [(MODES[mode], self.baseline, mode) for mode in ("forced", "oracle")]
        several = len(self.trained) > 1
        bars += [("trained with it" + (f": {_short(m)}" if several else ""), m, "normal") for m in self.trained]
        return [bar for bar in bars if any((bar[1], name, bar[2]) in self.results.index for name in self.benchmarks)]

    def table(self) -> Table:
        """Accuracies, and in parentheses the improvement in per cent."""
        bars = self.bars()
        header = ["Benchmark", "baseline", *(label for label, *_ in bars)]
        rows = []
        for name in self.benchmarks:
            cells = [(self.value(model, name, mode), self.improvement(model, name, mode)) for _, model, mode in bars]
            texts = ["not evaluated" if math.isnan(value) else f"{value:.3f} ({gain:+.1f})" for value, gain in cells]
            rows.append([name, f"{self.value(self.baseline, name, 'normal'):.3f}", *texts])
        return Table("Accuracy by benchmark (improvement in %)", header, rows)


def read_evaluations(folders: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Model, benchmark, mode, accuracy and rethink_ratio of every result.json in these folders, or below them.

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


def _read(file: Path) -> dict[str, Any]:
    try:
        row = json.loads(file.read_text("utf-8"))
        result = {name: str(row[name]) for name in ("model", "benchmark", "mode")}
        ratio = row.get("rethink_ratio")
        result |= {"accuracy": float(row["accuracy"]), "rethink_ratio": math.nan if ratio is None else float(ratio)}
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise ConfigError(f"--eval: {file} is no result of `rethinker eval`: {error}") from None
    except KeyError as error:
        raise ConfigError(f"--eval: {file} is no result of `rethinker eval`: it lacks {error}") from None
    if result["mode"] not in MODES:
        raise ConfigError(f"--eval: {file} has mode {result['mode']!r}; known are {', '.join(MODES)}")
    return result


def compare(evaluations: Sequence[dict[str, Any]]) -> Comparison | None:
    """Find the baseline: the only model with forced or oracle results, or else the first one given.

    Where every benchmark has a pair of models of its own, one with such results and one without, the pairs are compared
    as if they were one, by what they are.

    Returns:
        None where the baseline has no normal result above zero.
    """
    if not evaluations:
        return None
    import pandas as pd

    table = pd.DataFrame(evaluations)
    probed = table["mode"].ne("normal").groupby([table.benchmark, table.model]).any()  # by (benchmark, model)
    if probed.groupby("model").any().sum() > 1 and all(
        len(p) == 2 and p.sum() == 1 for _, p in probed.groupby(level=0)
    ):
        roles = {True: "without forced rethinking", False: "with forced rethinking"}
        table["model"] = [roles[bool(probed[key])] for key in zip(table.benchmark, table.model, strict=True)]
    models, probed = table.model.unique(), table.model[table["mode"] != "normal"].unique()
    baseline = probed[0] if len(probed) == 1 else models[0]
    normal = table[(table.model == baseline) & (table["mode"] == "normal") & (table.accuracy > 0)]
    results = table.drop_duplicates(["model", "benchmark", "mode"], keep="last")
    results = results.set_index(["model", "benchmark", "mode"]).sort_index()
    trained = [model for model in models if model != baseline]
    return Comparison(baseline, trained, list(normal.benchmark.unique()), results) if len(normal) else None


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
        ratios = [100 * comparison.value(model, name, "normal", "rethink_ratio") for name in comparison.benchmarks]
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
    """The short name of a model: a checkpoint of a run by the run's name."""
    parts = Path(model).parts
    return parts[-3] if len(parts) > 2 and parts[-2] == "checkpoints" else parts[-1] if parts else model
