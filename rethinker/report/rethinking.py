"""The rethinking analysis: what rethinking adds per benchmark, from the results of `rethinker eval`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from rethinker.config import ConfigError, one_line
from rethinker.report.drawing import COLORS, draw_bars, in_our_look, label_of, legend, new_figure

MODES = {"normal": "as it is", "forced": "rethinking forced", "oracle": "forced where wrong (upper bound)"}
RATIO = "rethinks by itself"


def read_evaluations(folders: Sequence[str | Path]) -> pd.DataFrame:
    """Model, benchmark, mode, accuracy and rethink_ratio of every result.json in these folders, or below them.

    Raises:
        ConfigError: a folder holds none, or a file is not to the schema.
    """
    files: dict[Path, None] = {}
    for folder in folders:
        found = sorted(Path(folder).rglob("result.json"))
        if not found:
            raise ConfigError(f"--eval {folder} holds no result.json; name a folder that `rethinker eval` wrote")
        files |= dict.fromkeys(path.resolve() for path in found)
    return pd.DataFrame([_read(file) for file in files])


def _read(file: Path) -> dict[str, Any]:
    try:
        row = json.loads(file.read_text("utf-8"))
        numbers = {"accuracy": float(row["accuracy"]), "rethink_ratio": float(row.get("rethink_ratio", "nan"))}
        return numbers | {name: str(row[name]) for name in ("model", "benchmark", "mode")}
    except (KeyError, ValueError, TypeError, OSError) as error:
        raise ConfigError(f"--eval: {file} is no result of `rethinker eval`: {one_line(error)}") from None


def compare(results: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    """The baseline's name, and accuracies by benchmark: its own, a column per mode and model beside it, and RATIO.

    The baseline is the model trained without forced rethinking: the one with forced or oracle results, or else the
    first one given. Benchmarks on which it is never right, or was not evaluated as it is, are left out. RATIO is of the
    first model trained with it.

    Raises:
        ConfigError: there is nothing to compare.
    """
    forced = results["mode"] != "normal"
    baseline = results.model[forced if forced.any() else results.index].iloc[0]
    results = results.drop_duplicates(["model", "benchmark", "mode"], keep="last").set_index("benchmark")
    by_itself = results[results["mode"] == "normal"]
    normal = by_itself.accuracy[(by_itself.model == baseline) & (by_itself.accuracy > 0)]
    trained = by_itself[by_itself.model != baseline]
    columns = {"baseline": normal}
    for mode in ("forced", "oracle"):
        columns[MODES[mode]] = results.accuracy[(results.model == baseline) & (results["mode"] == mode)]
    for model, own in trained.groupby("model", sort=False):
        columns[f"trained with it: {_short(model)}"] = own.accuracy
    table = pd.DataFrame(columns).reindex(normal.index).dropna(axis=1, how="all")
    if table.shape[1] < 2:
        raise ConfigError(
            "--eval: the results hold nothing to compare: give one model's in its normal mode with an accuracy above "
            "0, and beside it another model's or mode's on the same benchmark"
        )
    shown = trained.model.iloc[0] if len(trained) else baseline
    table[RATIO] = by_itself.rethink_ratio[by_itself.model == shown]
    return baseline, table.rename_axis(index=None, columns="Benchmark")


@in_our_look
def rethinking_analysis(table: pd.DataFrame) -> Figure:
    """Bars of relative improvement per benchmark; as a line, how often the trained model rethinks of its own accord."""
    figure = new_figure(3.8)
    axes = figure.subplots()
    improvement = 100 * (table.drop(columns=["baseline", RATIO]).div(table.baseline, axis=0) - 1)
    draw_bars(axes, improvement, "%+.0f")
    axes.axhline(0, color="#555555", linewidth=0.8)
    axes.tick_params(axis="x", rotation=25 if len(table) > 3 else 0)
    axes.set_ylabel("relative improvement, %")
    right = axes.twinx()
    right.plot(range(len(table)), 100 * table[RATIO], label=label_of(RATIO), color=COLORS[6], marker="o", linewidth=1.4)
    right.set_ylim(0, 105)
    right.set_ylabel("responses that rethink unforced, %")
    right.grid(visible=False)
    legend(figure, columns=2)
    return figure


def _short(model: str) -> str:
    """The short name of a model: a checkpoint of a run by the run's name."""
    path = Path(model)
    return path.parent.parent.name if path.parent.name == "checkpoints" else path.name
