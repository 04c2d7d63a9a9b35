"""The run's report: one HTML page that needs nothing else, and its figures as files beside it."""

from __future__ import annotations

import base64
import hashlib
import re
import sys
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from rethinker.config import ConfigError, one_line
from rethinker.report import completions
from rethinker.report.completions import sample_completions
from rethinker.report.drawing import save_figure
from rethinker.report.figures import FIGURES
from rethinker.report.rethinking import compare, read_evaluations, rethinking_analysis
from rethinker.report.runs import RunRecord, read_runs
from rethinker.report.summary import categories, changed_settings, summary


def write_report(
    run_folders: Sequence[str | Path],
    output: str | Path | None = None,
    evaluations: Sequence[str | Path] = (),
) -> Path:
    """Write the report of one run, or of several side by side.

    Args:
        run_folders: folders of runs; one may still be going on.
        output: the page, ending in .html; by default `report.html` in the run's folder, or for several runs here.
            Each figure is also written as `<output without .html>_figures/<name>.svg`.
        evaluations: folders that `rethinker eval` wrote, for the rethinking analysis.

    Returns:
        The page's path.

    Raises:
        ConfigError: a folder is no run's or has no step yet, results that cannot be read, or nowhere to write.
    """
    runs = read_runs(run_folders)
    output = Path(output) if output else (runs[0].folder if len(runs) == 1 else Path()) / "report.html"
    if output.suffix not in (".html", ".htm"):
        raise ConfigError(f"--output {output}: the report is a page; end its name in .html")
    comparison = compare(read_evaluations(evaluations))
    drawn = [(figure, figure.draw(runs)) for figure in FIGURES]
    analysis = rethinking_analysis(comparison) if comparison else None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = output.with_name(f"{output.stem}_figures")
        folder.mkdir(exist_ok=True)
        figures = []
        for figure, drawing in drawn:
            ends = [_ends(run, figure.metric) for run in runs]
            svg = _svg(drawing, folder / f"{figure.name}.svg", f"{figure.title}. {' '.join(filter(None, ends))}")
            text = figure.meaning if drawing else figure.missing
            figures.append({"name": figure.name, "title": figure.title, "text": text, "svg": svg})
        analysis_svg = _svg(analysis, folder / "rethinking.svg", "Relative improvement by benchmark, as bars.")
        table = comparison.table() if analysis else None
        page = _render(
            runs=runs,
            figures=figures,
            analysis={"svg": analysis_svg, "comparison": comparison, "table": table, "given": bool(evaluations)},
            summary=summary(runs),
            tables=[table for table in (categories(runs), changed_settings(runs)) if table],
            browser=sample_completions(runs),
            limits=completions,
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
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    except ModuleNotFoundError as error:
        raise ConfigError("the report needs jinja2: install the extra `cpu` or `gpu`") from error
    files = resources.files("rethinker.report")
    parts = {kind: (files / f"page.{kind}").read_text("utf-8") for kind in ("html", "css", "js")}
    digest = base64.b64encode(hashlib.sha256(parts["js"].encode()).digest()).decode()
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["svg"] = Markup  # our own drawings: matplotlib has escaped the texts in them
    assets = {"css": Markup(parts["css"]), "js": Markup(parts["js"]), "script_hash": f"sha256-{digest}"}
    return environment.from_string(parts["html"]).render(**values, **assets)


def _svg(figure: Any | None, file: Path, label: str) -> str | None:
    """Write the figure's file, and return it as markup for the page, sized by the page; an old file does not stay."""
    if figure is None:
        file.unlink(missing_ok=True)
        return None
    svg = save_figure(figure, file).read_text("utf-8")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{file.stem}-", svg)  # ids of its own
    box = re.search(r'viewBox="[^"]*"', svg)[0]
    opening = f'<svg role="img" aria-label="{escape(label)}" {box} xmlns:xlink="http://www.w3.org/1999/xlink">'
    return opening + svg[svg.index(">") + 1 :]


def _ends(run: RunRecord, metric: str) -> str:
    """First and last value of a metric, in words."""
    steps, values = run.series(metric)
    if not len(steps):
        return ""
    return f"{run.label}: {values[0]:.3g} at step {steps[0]}, {values[-1]:.3g} at step {steps[-1]}."
