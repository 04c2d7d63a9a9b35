"""The `rethinker` command: a settings mistake is one line on stderr and exit code 2."""

from __future__ import annotations

import os
import pkgutil
import sys
import time
from collections.abc import Sequence

from rethinker.command_line import Parser
from rethinker.config import ConfigError
from rethinker.doctor import how_to_install
from rethinker.runtime.garbage import few_full_collections
from rethinker.settings import presets, resolve_config, shipped_recipes, to_yaml
from rethinker.train import train
from rethinker.version import __version__

USAGE = """usage: rethinker COMMAND ...

  rethinker train RECIPE [--section.name value ...]   train; RECIPE is a shipped recipe or a .yaml file
  rethinker train RECIPE [...] --print_config         print the resolved settings with their docs, and stop
  rethinker train --help                              list the shipped recipes and presets
  rethinker eval CHECKPOINT --benchmark NAME          answer a benchmark: accuracy with its interval, every response
  rethinker eval --compare RESULT RESULT ...          paired differences of results on the same questions
  rethinker eval --help                               list the benchmarks and all options
  rethinker curate RECIPE --output FOLDER             measure pass rates; write the questions worth training on
  rethinker report RUN... [--output FILE.html]        one page about a run, or several side by side
  rethinker export RUN [--output FOLDER]              its model as a folder to share, with a model card
  rethinker plan RECIPE --gpus N --gpu-memory GIB     memory and batches of a run, before anything starts
  rethinker serve RECIPE [--port N]                   a vLLM server for runs with rollout.backend=server
  rethinker doctor                                    what is installed, what is missing, how to add it
  rethinker --version

On several processes: torchrun --nproc-per-node N -m rethinker train RECIPE [--section.name value ...]
"""

COMMANDS = {
    "train": "rethinker.cli:train_command",
    "plan": "rethinker.plan.command:main",
    "eval": "rethinker.evaluation.command:main",
    "curate": "rethinker.curation.command:main",
    "report": "rethinker.report.command:main",
    "export": "rethinker.export:main",
    "serve": "rethinker.rollout.server.serve:main",
    "doctor": "rethinker.doctor:main",
}
"""The function of each command: it takes the arguments behind the command's name and returns the exit code."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `rethinker` script; returns its exit code."""
    command, *arguments = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if command in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if command == "--version":
        print(f"rethinker {__version__}")
        return 0
    # torch reads it when it is imported; on machines with one node it warns of its NUMA binding.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        if command not in COMMANDS:
            raise ConfigError(f"unknown command {command!r}; commands are {', '.join(COMMANDS)}")
        return pkgutil.resolve_name(COMMANDS[command])(arguments)
    except ConfigError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(3)  # ranks share most mistakes: rank 0 reports them, and torchrun ends this rank as it waits
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "rethinker").startswith("rethinker"):
            raise
        print(f"error: the package {error.name} is missing: {how_to_install(error.name)}", file=sys.stderr)
        return 2
    except SystemExit as end:  # argparse has printed the help
        return end.code or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def train_command(arguments: Sequence[str]) -> int:
    """`rethinker train`: the settings are checked before anything slow is imported."""
    parser = Parser(
        prog="rethinker train",
        usage="rethinker train RECIPE [--section.name value ...] [--print_config]",
        epilog=f"Shipped recipes: {', '.join(shipped_recipes())}. Presets: {', '.join(presets())}. --print_config "
        "prints every setting with its value and its meaning.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a shipped recipe, RECIPE+PRESET, or a .yaml file")
    parser.add_argument("--print_config", action="store_true", help="print the resolved settings with their docs")
    options, overrides = parser.parse_recipe(arguments)
    if options.print_config:
        print(to_yaml(resolve_config(options.recipe, overrides)), end="")
        return 0
    with few_full_collections():
        train(options.recipe, overrides)
    return 0
