"""The `rethinker` command: a settings mistake is one line on stderr and exit code 2."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence

from rethinker.command_line import Parser, recipe_first
from rethinker.config import ConfigError
from rethinker.version import __version__

USAGE = """usage: rethinker COMMAND ...

  rethinker train RECIPE [--section.name value ...]   train; RECIPE is a shipped recipe or a .yaml file
  rethinker train RECIPE [...] --print_config         print the resolved settings with their docs, and stop
  rethinker train --help                              list the shipped recipes and every setting
  rethinker eval CHECKPOINT --benchmark NAME          answer a benchmark: accuracy with its interval, every response
  rethinker eval --compare RESULT RESULT ...          paired differences of results on the same questions
  rethinker eval --help                               list the benchmarks and all options
  rethinker curate RECIPE --output FOLDER             measure pass rates; write the questions worth training on
  rethinker report RUN... [--output FILE.html]        one page about a run, or several side by side
  rethinker export RUN [--push OWNER/NAME]            its model as a folder to share, with a model card
  rethinker plan RECIPE --gpus N --gpu-memory GIB     memory, batches and time of a run, before anything starts
  rethinker serve RECIPE [--replicas N]               vLLM servers for runs with rollout.backend=server
  rethinker doctor                                    what is installed, what is missing, how to add it
  rethinker --version

On several processes: torchrun --nproc-per-node N -m rethinker train RECIPE [--section.name value ...]
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `rethinker` script; returns its exit code."""
    command, *arguments = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if command in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if command == "--version":
        print(f"rethinker {__version__}")
        return 0
    if command == "train":
        return train_main(arguments)
    commands = {
        "plan": _plan,
        "eval": _eval,
        "curate": _curate,
        "report": _report,
        "export": _export,
        "serve": _serve,
        "doctor": _doctor,
    }
    if command in commands:
        return guarded(lambda: commands[command](arguments))
    return guarded(lambda: _unknown(command, commands))


def train_main(argv: Sequence[str]) -> int:
    """`rethinker train`, also under torchrun: RECIPE and overrides to an exit code."""
    return guarded(lambda: _train(list(argv)))


def guarded(command: Callable[[], int]) -> int:
    """Run a command; a ConfigError becomes one line on stderr and exit code 2."""
    try:
        return command()
    except ConfigError as error:
        if os.environ.get("RANK", "0") != "0":
            # Ranks share their mistakes: rank 0 tells, and torchrun ends this one as it waits. What only this rank
            # saw it tells itself.
            time.sleep(3)
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2
    except SystemExit as end:  # argparse has printed the help
        return end.code or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _train(argv: list[str]) -> int:
    from rethinker.settings import load_config, resolve_config, to_yaml

    if "-h" in argv or "--help" in argv:
        print(_train_help())
        return 0
    print_config = "--print_config" in argv
    argv = [argument for argument in argv if argument != "--print_config"]
    recipe_first(argv)
    recipe, *overrides = argv
    if print_config:
        print(to_yaml(resolve_config(recipe, overrides)), end="")
        return 0
    config = load_config(recipe, overrides)  # before anything slow is imported
    from rethinker.train import train

    train(config)
    return 0


def _eval(arguments: list[str]) -> int:
    from rethinker.evaluation.command import main as evaluate

    return evaluate(arguments)


def _curate(arguments: list[str]) -> int:
    from rethinker.curation.command import main as curate

    return curate(arguments)


def _doctor(arguments: list[str]) -> int:
    from rethinker import doctor

    if arguments:
        raise ConfigError(f"rethinker doctor takes no arguments, and got {arguments[0]!r}")
    return doctor.main()


def _plan(arguments: list[str]) -> int:
    from rethinker.plan.command import main as plan

    return plan(arguments)


def _serve(arguments: list[str]) -> int:
    from rethinker.rollout.server.serve import main as serve

    return serve(arguments)


def _report(arguments: list[str]) -> int:
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


def _export(arguments: list[str]) -> int:
    from rethinker.export import main as export

    return export(arguments)


def _unknown(command: str, commands: Iterable[str]) -> int:
    raise ConfigError(f"unknown command {command!r}; commands are train, {', '.join(commands)}")


def _train_help() -> str:
    from rethinker.settings import presets, settings, shipped_recipes

    lines = ["usage: rethinker train RECIPE [--section.name value ...] [--print_config]", "", "shipped recipes:"]
    lines += [f"  {name}" for name in shipped_recipes()]
    lines += ["", "presets, added as RECIPE+PRESET:", *(f"  {name}" for name in presets())]
    lines += ["", "settings (--name value, with the default in brackets):"]
    for setting in settings():
        lines.append(f"  --{setting.key} [{'null' if setting.default is None else setting.default}]")
        lines.append(f"      {setting.doc}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
