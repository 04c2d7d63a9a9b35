"""`rethinker report`: the options, and the page they ask for."""

from __future__ import annotations

from collections.abc import Sequence

from rethinker.command_line import Parser


def main(arguments: Sequence[str]) -> int:
    """Write the page and print its path; returns the exit code."""
    parser = Parser(
        prog="rethinker report",
        description="Write one HTML page about a run, or about several side by side: its figures, its settings, and "
        "a browser of its completions. The page needs no network; the figures also lie beside it as SVG.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, runs/<run.name>; it may be running")
    parser.add_argument(
        "--output", metavar="FILE.html", help="the page [report.html in the run's folder; for several runs, here]"
    )
    parser.add_argument(
        "--eval",
        nargs="+",
        action="extend",
        default=[],
        metavar="FOLDER",
        help="results of `rethinker eval`, for the rethinking analysis: of the model trained without forced "
        "rethinking, in its modes normal, forced and oracle, and of the one trained with it",
    )
    options = parser.parse_args(arguments)
    from rethinker.report.page import write_report

    print(write_report(options.runs, options.output, options.eval))
    return 0
