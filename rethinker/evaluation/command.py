"""`rethinker eval`: from arguments to a table, a result folder and an exit code.

Everything that can be said without a model (arguments, settings, data, folders) is checked before torch is imported.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from rethinker.checks import check_folder, check_model
from rethinker.command_line import Parser
from rethinker.config import ConfigError
from rethinker.doctor import check_packages
from rethinker.evaluation.benchmark import load_benchmark, shipped_benchmarks
from rethinker.evaluation.settings import RECORDED, Mode, check_mode, eval_config

_DESCRIPTION = """Answer a benchmark greedily, check the answers as the training reward does, and write result.json and
responses.parquet. CHECKPOINT is a run's checkpoints/best, or any supported folder or Hugging Face name. A run's
checkpoint is asked as the run's config.yaml says: prompt, pixel limits, longest answer, tools."""


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code.

    Raises:
        ConfigError: any mistake in arguments, settings or data.
    """
    if "--compare" in arguments:
        check_packages("--compare", "scipy", "pyarrow", "pandas")
        from rethinker.evaluation.compare import compare_results, describe_comparison

        print(describe_comparison(compare_results([folder for folder in arguments if folder != "--compare"])))
        return 0
    options, overrides = parse(arguments)
    benchmarks = [load_benchmark(name) for name in options.benchmark]
    checkpoint = find_checkpoint(options.checkpoint)
    config = eval_config(checkpoint, overrides)
    check_mode(options.mode, config)
    if options.data is not None and len(benchmarks) > 1:
        raise ConfigError(f"--data {options.data} is for one --benchmark; for several set RETHINKER_DATA")
    folders = _output_folders(options, checkpoint, [benchmark.name for benchmark in benchmarks])
    from rethinker.evaluation.benchmark_rows import benchmark_queries

    loaded = [benchmark_queries(benchmark, options.data) for benchmark in benchmarks]
    from rethinker.evaluation.evaluate import run_benchmarks

    run_benchmarks(config, options.mode, options.limit, list(zip(benchmarks, loaded, folders, strict=True)))
    return 0


def parse(arguments: Sequence[str]) -> tuple[Namespace, list[str]]:
    """The options, `benchmark` being a list without repetition, and the overrides of settings.

    Raises:
        ConfigError: an unknown option, one without its value, no checkpoint, no benchmark.
    """
    known = ", ".join(shipped_benchmarks())
    parser = Parser(
        prog="rethinker eval",
        description=_DESCRIPTION,
        usage="%(prog)s CHECKPOINT --benchmark NAME [options] [--section.name value ...]\n"
        "       %(prog)s --compare RESULT_FOLDER RESULT_FOLDER ...",
        epilog=f"Settings that change answers: {', '.join(f'--{name}' for name in RECORDED)}. --compare shows paired "
        "differences to the first result on the same questions, with a 95% interval and McNemar's exact test. On "
        "several GPUs: torchrun --nproc-per-node N -m rethinker eval ...",
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT")
    names = {"type": lambda text: [name for name in text.split(",") if name], "action": "extend", "metavar": "NAME"}
    add("--benchmark", required=True, **names, help=f"one or several of {known}, or a .yaml file; also A,B")
    modes = "normal; forced: a rethinking trigger follows every first answer and the model goes on; oracle: only after "
    modes += "wrong answers, an upper bound; both without environment.use"
    add("--mode", default="normal", metavar="MODE", choices=get_args(Mode), help=modes)
    add("--limit", type=int, metavar="N", help="a random sample of N questions, the same every time")
    places = "its data: a folder or file [$RETHINKER_DATA/NAME, the Hugging Face cache, or the hub]"
    add("--data", metavar="PATH", help=places)
    outputs = "the results [evaluations/CHECKPOINT/BENCHMARK[-MODE]]; of several benchmarks each has a folder below it"
    add("--output", metavar="FOLDER", help=outputs)
    if arguments and arguments[0].startswith("-") and not {"-h", "--help"}.intersection(arguments):
        parser.error("name the checkpoint first: behind a setting it would be that setting's value")
    options, overrides = parser.parse_known_args(list(arguments))
    options.benchmark = list(dict.fromkeys(options.benchmark))
    if not options.benchmark:
        parser.error(f"name a benchmark: {known}")
    if options.limit is not None and options.limit < 1:
        parser.error(f"--limit {options.limit}: give a number of questions, at least 1")
    return options, overrides


def find_checkpoint(name: str) -> str:
    """A model folder, checked to hold a model, or a Hugging Face name as it is.

    Raises:
        ConfigError: no model there, or a run, whose best checkpoint was probably meant.
    """
    folder = Path(os.path.expanduser(name))
    if (folder / "checkpoints").is_dir():
        raise ConfigError(f"checkpoint {name} is a run's folder; did you mean {folder / 'checkpoints' / 'best'}?")
    check_model(name, "checkpoint ")
    return str(folder) if folder.is_dir() else name


def _output_folders(options: Namespace, checkpoint: str, names: list[str]) -> list[Path]:
    """One folder per benchmark; none may hold a result already."""
    path = Path(checkpoint).absolute()
    label = path.resolve().name if path.is_dir() else checkpoint.strip("/").replace("/", "-")
    if path.parent.name == "checkpoints":
        label = f"{path.parent.parent.name}-{path.name}"
    parent = Path("evaluations") / label if options.output is None else Path(options.output).expanduser()
    suffix = "" if options.mode == "normal" else f"-{options.mode}"
    folders = [parent / f"{name}{suffix}" for name in names]
    if options.output is not None and len(names) == 1:
        folders = [parent]
    for folder in folders:
        check_folder(folder, f"--output {folder}")
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"--output {folder} holds files already; choose another folder")
    if len(set(names)) < len(names):
        raise ConfigError(f"--benchmark: two of {', '.join(names)} share a name, and so a folder; set `name` in one")
    return folders
