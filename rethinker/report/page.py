"""The run's report: one HTML page that needs nothing else, and its figures as files beside it."""

from __future__ import annotations

import base64
import hashlib
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from rethinker.config import ConfigError, one_line
from rethinker.report.comparison import NOTES, compare_runs, comparison
from rethinker.report.completions import sample_completions
from rethinker.report.drawing import save_figure
from rethinker.report.figures import FIGURES
from rethinker.report.rethinking import compare, read_evaluations, rethinking_analysis
from rethinker.report.runs import all_stages, read_runs
from rethinker.report.story import STORY, before_and_after, own_rethinking
from rethinker.report.summary import categories, changed_settings, summary


def write_report(
    run_folders: Sequence[str | Path],
    output: str | Path | None = None,
    evaluations: Sequence[str | Path] = (),
) -> Path:
    """Write the report of one run, or of several side by side, and return the page's path.

    Args:
        run_folders: folders of runs; one may still be going on.
        output: the page, ending in .html; by default `report.html` in the run's folder, or for several runs here.
            Each figure is also written as `<output without .html>_figures/<name>.svg`.
        evaluations: folders that `rethinker eval` wrote, for the rethinking analysis.

    Raises:
        ConfigError: a folder is no run's or has no step yet, results that cannot be read, or nowhere to write.
    """
    runs = read_runs(run_folders)
    output = Path(output) if output else (runs[0].folder if len(runs) == 1 else Path()) / "report.html"
    baseline, accuracies = compare(read_evaluations(evaluations)) if evaluations else ("", None)
    folder = output.with_name(f"{output.stem}_figures")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        story, figures = (
            [
                {**vars(figure), "image": _image(figure.drawn(runs), folder / f"{figure.name}.svg")}
                for figure in section
                if figure.suits(runs)
            ]
            for section in (STORY, FIGURES)
        )
        tables = {"Held-out accuracy by category": categories(runs)}
        if accuracies is not None:
            texts = {"name": "rethinking", "title": "Rethinking analysis"}
            texts["meaning"] = f"Relative improvement over {baseline} as it is; the accuracies are in a table below."
            figures.append({**texts, "image": _image(rethinking_analysis(accuracies), folder / "rethinking.svg")})
            tables["Accuracies of the rethinking analysis"] = accuracies.map("{:.3f}".format, "ignore").fillna("")
        tables["Settings that differ from their defaults"] = changed_settings(runs)
        sample = sample_completions(all_stages(runs))
        tell = (before_and_after, own_rethinking) if len(runs) == 1 else ()
        examples = [example for one in tell if (example := one(runs[0], sample["unreadable"]))]
        page = _render(
            runs=runs,
            labels=[stage.label for stage in all_stages(runs)],
            story=story,
            examples=examples,
            figures=figures,
            summary=_html(summary(runs)),
            comparison=_html(comparison(compare_runs(runs)).replace(" to ", "\u00a0to\u00a0", regex=True))
            if len(runs) > 1
            else None,
            notes=NOTES,
            tables={title: _html(table) for title, table in tables.items() if table is not None},
            **sample,
        )
        output.write_text(page, encoding="utf-8", errors="replace")  # half a surrogate pair, cut by a model
    except OSError as error:
        raise ConfigError(f"--output {output} cannot be written: {error.strerror or error}") from None
    return output


def report_or_warning(run_folder: str | Path) -> Path | None:
    """The report of a run that has just ended; where it fails, one line says why, and the run stays as it is."""
    try:
        return write_report([run_folder])
    except Exception as error:  # whatever it is, a trained model is worth more than its report
        print(f"warning: no report: {one_line(error)}", file=sys.stderr, flush=True)
        return None


def _render(**values: Any) -> str:
    """The template with everything that users and models wrote escaped, and the page's one script allowed by hash."""
    parts = {kind: Path(__file__).with_name(f"page.{kind}").read_text("utf-8") for kind in ("html", "css", "js")}
    digest = base64.b64encode(hashlib.sha256(parts["js"].encode()).digest()).decode()
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    assets = {"css": Markup(parts["css"]), "js": Markup(parts["js"]), "script_hash": f"sha256-{digest}"}
    return environment.from_string(parts["html"]).render(**values, **assets)


def _html(table: pd.DataFrame) -> Markup:
    """A table whose cells are text, escaped."""
    with pd.option_context("display.max_colwidth", None):
        return Markup(table.map(escape).rename(index=escape, columns=escape).to_html(escape=False, border=0))


def _image(figure: Figure | None, file: Path) -> str | None:
    """Write the figure's file, and return it as an image's address for the page; an old file does not stay."""
    if figure is None:
        file.unlink(missing_ok=True)
        return None
    return "data:image/svg+xml;base64," + base64.b64encode(save_figure(figure, file).read_bytes()).decode()
