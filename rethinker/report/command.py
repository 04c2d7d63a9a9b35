"""`rethinker report`: the options, and the page or picture they ask for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rethinker.command_line import Parser


def main(arguments: Sequence[str]) -> int:
    """Write the page and print its path; returns the exit code."""
    parser = Parser(
        prog="rethinker report",
        description="Write one HTML page about a run, or about several side by side: its figures, its settings, and "
        "a browser of its completions. The page needs no network; the figures also lie beside it as SVG.",
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folder of a run, runs/<run.name>; it may be running")
    output = "the page [report.html in the run's folder; for several runs, here]; FILE.svg, .png or .pdf is the "
    output += "learning curve alone, of several seeds as mean and range"
    add("--output", type=Path, metavar="FILE.html", help=output)
    evaluations = "results of `rethinker eval`, for the rethinking analysis: of the model trained without forced "
    evaluations += "rethinking, in its modes normal, forced and oracle, and of the one trained with it"
    add("--eval", nargs="+", action="extend", default=[], metavar="FOLDER", help=evaluations)
    options = parser.parse_args(arguments)
    if options.output and options.output.suffix not in (".html", ".svg", ".png", ".pdf"):
        parser.error(f"--output {options.output}: end its name in .html for the page, or in .svg, .png or .pdf")
    if options.output and options.output.suffix != ".html":
        from rethinker.report.learning import learning_curve

        print(learning_curve(options.runs, options.output))
    else:
        from rethinker.report.page import write_report

        print(write_report(options.runs, options.output, options.eval))
    return 0
