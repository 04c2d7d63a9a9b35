"""`rethinker report`: the options, and the page or picture they ask for."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from rethinker.command_line import Parser


def main(arguments: Sequence[str]) -> int:
    """Write the page and print its path; returns the exit code."""
    parser = Parser(
        prog="rethinker report",
        description="Write one HTML page about a run, or about several side by side: its figures, its settings, and "
        "a browser of its completions. The page needs no network; the figures also lie beside it as SVG. Several runs "
        "are also compared in numbers, runs that differ in their seed alone as one row.",
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folder of a run, runs/<run.name>; it may be running")
    output = "the page [report.html in the run's folder; for several runs, here]; FILE.svg, .png or .pdf is the "
    output += (
        "learning curve alone, of several seeds as mean and range; FILE.md or .csv the comparison in numbers alone"
    )
    add("--output", type=Path, metavar="FILE.html", help=output)
    evaluations = "results of `rethinker eval`, for the rethinking analysis: of the model trained without forced "
    evaluations += "rethinking, in its modes normal, forced and oracle, and of the one trained with it"
    add("--eval", nargs="+", action="extend", default=[], metavar="FOLDER", help=evaluations)
    options = parser.parse_args(arguments)
    suffix = options.output.suffix if options.output else ".html"
    if suffix not in (".html", ".svg", ".png", ".pdf", ".md", ".csv"):
        parser.error(f"--output {options.output}: end its name in .html, .svg, .png, .pdf, .md or .csv")
    if suffix in (".svg", ".png", ".pdf"):
        from rethinker.report.learning import learning_curve

        print(learning_curve(options.runs, options.output))
        return 0
    from rethinker.report.comparison import as_text, compare_runs, write_comparison
    from rethinker.report.runs import read_runs

    if suffix != ".html":
        print(write_comparison(compare_runs(read_runs(options.runs)), options.output))
        return 0
    from rethinker.report.page import write_report

    page = write_report(options.runs, options.output, options.eval)
    if len(runs := read_runs(options.runs)) > 1:
        print(as_text(compare_runs(runs), shutil.get_terminal_size((160, 24)).columns), end="\n\n")
    print(page)
    return 0
