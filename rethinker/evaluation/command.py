"""`rethinker eval`: from arguments to a table, a result folder and an exit code.

Everything that can be said without a model (arguments, settings, data, folders) is checked before torch is imported.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from rethinker.config import Config, ConfigError
from rethinker.doctor import how_to_install
from rethinker.evaluation import Mode
from rethinker.evaluation.benchmark import Benchmark, benchmark_queries, load_benchmark, shipped_benchmarks
from rethinker.families.model_folder import check_model_folder

# Settings that shape an evaluation; the others are about training.
SETTINGS = (
    *("data.prompt", "data.system", "data.max_prompt_tokens", "data.min_pixels", "data.max_pixels", "data.max_images"),
    "data.max_image_pixels",
    *("policy.dtype", "rollout.backend", "rollout.max_new_tokens", "rollout.gpu_memory_utilization"),
    *("rollout.kv_cache_gb", "rollout.tensor_parallel_size", "rollout.timeout_s", "rethink.triggers"),
    *("reward.function", "reward.workers", "reward.timeout_s", "reward.memory_gb"),
)
# What a checkpoint of a run keeps of the run's config.yaml: how the model was asked.
INHERITED = (
    *("data.prompt", "data.system", "data.min_pixels", "data.max_pixels", "policy.dtype", "rollout.backend"),
    *("rollout.max_new_tokens", "rollout.kv_cache_gb"),
)
# What a comparison must know of them.
RECORDED = ("data.prompt", "data.system", "data.min_pixels", "data.max_pixels")
RECORDED += ("data.max_images", "policy.dtype", "rollout.backend", "rollout.max_new_tokens", "reward.function")

USAGE = """usage: rethinker eval CHECKPOINT --benchmark NAME [--benchmark NAME ...] [--mode MODE] [--limit N]
                      [--data PATH] [--output FOLDER] [--section.name value ...]
       rethinker eval --compare RESULT_FOLDER RESULT_FOLDER ...

Answers a benchmark greedily, checks the answers as the training reward does, and writes result.json and
responses.parquet. CHECKPOINT is a run's checkpoints/best, or any supported folder or Hugging Face name. A run's
checkpoint is asked as the run's config.yaml says: prompt, pixel limits, longest answer.

  --benchmark NAME   one or several of (also separated by commas, or a .yaml file):
{benchmarks}
  --mode MODE        normal; forced: a rethinking trigger follows every first answer and the model goes on; oracle: only
                     after wrong answers, an upper bound
  --limit N          a random sample of N questions, the same every time
  --data PATH        folder or file with the benchmark's data; by default $RETHINKER_DATA/NAME, the Hugging Face cache,
                     or the hub
  --output FOLDER    where results go, by default evaluations/CHECKPOINT/BENCHMARK[-MODE]; of several benchmarks each
                     has a folder below it
  --compare          compare results on the same questions with the first one: paired differences with a 95% interval
                     and McNemar's exact test

settings that an evaluation takes:
{settings}

On several GPUs: torchrun --nproc-per-node N -m rethinker eval ...
"""


@dataclass
class Request:
    """The parsed arguments."""

    checkpoint: str | None = None
    benchmarks: list[str] = field(default_factory=list)
    mode: str = "normal"
    limit: int | None = None
    data: str | None = None
    output: str | None = None
    overrides: list[str] = field(default_factory=list)


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code.

    Raises:
        ConfigError: any mistake in arguments, settings or data.
    """
    if not arguments or "-h" in arguments or "--help" in arguments:
        print(usage(), end="")
        return 0
    if "--compare" in arguments:
        return _compare(list(arguments))
    request = parse(arguments)
    benchmarks = [load_benchmark(name) for name in request.benchmarks]
    checkpoint = find_checkpoint(request.checkpoint)
    config = eval_config(checkpoint, request.overrides)
    if request.data is not None and len(benchmarks) > 1:
        raise ConfigError(f"--data {request.data} is for one --benchmark; for several set RETHINKER_DATA")
    folders = _output_folders(request, checkpoint, benchmarks)
    loaded = [benchmark_queries(benchmark, request.data) for benchmark in benchmarks]

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is imported: NUMA binding is no news
    from rethinker.evaluation.run import run_benchmarks

    run_benchmarks(config, request.mode, request.limit, list(zip(benchmarks, loaded, folders, strict=True)))
    return 0


def usage() -> str:
    """The help text."""
    benchmarks = [(name, load_benchmark(name).title) for name in shipped_benchmarks()]
    width = max(len(name) for name, _ in benchmarks)
    return USAGE.replace(
        "{benchmarks}", "\n".join(f"                       {name.ljust(width)}  {title}" for name, title in benchmarks)
    ).replace("{settings}", "\n".join(f"  --{name}" for name in SETTINGS))


def parse(arguments: Sequence[str]) -> Request:
    """Arguments to a Request; dotted settings stay as they are.

    Raises:
        ConfigError: an unknown option, one without its value, no or two checkpoints, no benchmark.
    """
    request = Request()
    rest = list(arguments)
    while rest:
        option, equals, value = rest.pop(0).partition("=")
        if not option.startswith("--"):
            if request.checkpoint is not None:
                raise ConfigError(f"unexpected argument {option + equals + value!r}: one CHECKPOINT at a time")
            request.checkpoint = option + equals + value
            continue
        if "." not in option and option not in ("--benchmark", "--mode", "--limit", "--data", "--output"):
            raise ConfigError(f"unknown option {option}; `rethinker eval --help` lists them")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"{option} needs a value")
            value = rest.pop(0)
        if "." in option:
            request.overrides += [f"{option}={value}"]
        elif option == "--benchmark":
            request.benchmarks += [name for name in value.split(",") if name and name not in request.benchmarks]
        elif option == "--limit":
            if not value.isdecimal() or int(value) < 1:
                raise ConfigError(f"--limit {value}: give a number of questions, at least 1")
            request.limit = int(value)
        elif option == "--mode":
            if value not in get_args(Mode):
                raise ConfigError(f"--mode {value} must be one of {', '.join(get_args(Mode))}")
            request.mode = value
        else:
            setattr(request, option[2:], value)
    if request.checkpoint is None:
        raise ConfigError("name a checkpoint first: a run's checkpoints/best, a model folder, or a Hugging Face name")
    if not request.benchmarks:
        raise ConfigError(f"name a benchmark: --benchmark {' | '.join(shipped_benchmarks())}")
    return request


def find_checkpoint(name: str) -> str:
    """A model folder, checked to hold a model, or a Hugging Face name as it is.

    Raises:
        ConfigError: no model there, saying what was probably meant.
    """
    folder = Path(os.path.expanduser(name))
    looks_local = folder.exists() or folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1
    if not looks_local:
        if (folder.parent).is_dir():
            raise ConfigError(f"checkpoint {name} does not exist; in {folder.parent} are {_listing(folder.parent)}")
        return name
    if not folder.is_dir():
        known = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
        raise ConfigError(f"checkpoint {name} does not exist; in {known} are {_listing(known)}")
    if not (folder / "config.json").is_file():
        inside = [
            place for place in ("checkpoints/best", "best", "checkpoints/last", "last") if (folder / place).is_dir()
        ]
        hint = f"did you mean {folder / inside[0]}?" if inside else "give a model folder in Hugging Face format"
        raise ConfigError(f"checkpoint {name} has no config.json; {hint}")
    check_model_folder(folder, f"checkpoint {name}")
    return str(folder)


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "no files"


def eval_config(checkpoint: str, overrides: Sequence[str]) -> Config:
    """The settings of an evaluation: evaluation/settings.yaml, the run's own, the command line.

    Raises:
        ConfigError: a setting that is unknown, wrong, or of no use here; a package that is missing.
    """
    from rethinker.settings import resolve_config

    base = Path(str(resources.files("rethinker"))) / "evaluation" / "settings.yaml"
    resolve_config(base, overrides)  # names the unknown ones
    for option in overrides:
        key = option.removeprefix("--").partition("=")[0]
        if not key.startswith(SETTINGS):
            raise ConfigError(f"{key} has no effect on an evaluation; settings that do: {', '.join(SETTINGS)}")
    inherited = [f"--{key}={value}" for key, value in run_settings(checkpoint).items()]
    config = resolve_config(base, [*inherited, *overrides])
    config.policy.model = checkpoint
    if config.rollout.backend == "recorded":
        raise ConfigError("rollout.backend=recorded has no new answers; use vllm or hf")
    for package in ("transformers", "pyarrow", "PIL"):
        if find_spec(package) is None:
            raise ConfigError(f"rethinker eval needs the package {package}: {how_to_install(package)}")
    if config.rollout.backend == "vllm" and find_spec("vllm") is None:
        raise ConfigError(
            f"rollout.backend=vllm needs the package vllm: {how_to_install('vllm')}; or add --rollout.backend hf"
        )
    return config


def run_settings(checkpoint: str) -> dict[str, Any]:
    """How a run asked its model, from the config.yaml above the run's checkpoint; {} for any other model."""
    path = Path(checkpoint).absolute().parent.parent / "config.yaml"
    from rethinker.settings import read_yaml_file

    if Path(checkpoint).absolute().parent.name != "checkpoints" or not path.is_file():
        return {}
    content = read_yaml_file(path, str(path))
    found: dict[str, Any] = {}
    for key in INHERITED:
        section, name = key.split(".")
        part = content.get(section) if isinstance(content, dict) else None
        value = part.get(name) if isinstance(part, dict) else None
        if value is not None and value not in ("recorded", "server"):
            found[key] = value
    return found


def _output_folders(request: Request, checkpoint: str, benchmarks: list[Benchmark]) -> list[Path]:
    """One folder per benchmark; none may hold a result already."""
    suffix = "" if request.mode == "normal" else f"-{request.mode}"
    path = Path(checkpoint)
    run = path.absolute().parent
    label = f"{run.parent.name}-{path.name}" if run.name == "checkpoints" else checkpoint.strip("/").replace("/", "-")
    label = path.resolve().name if path.is_dir() and run.name != "checkpoints" else label
    if request.output is None:
        folders = [Path("evaluations") / label / f"{benchmark.name}{suffix}" for benchmark in benchmarks]
    elif len(benchmarks) == 1:
        folders = [Path(request.output).expanduser()]
    else:
        folders = [Path(request.output).expanduser() / f"{benchmark.name}{suffix}" for benchmark in benchmarks]
    for folder in folders:
        if folder.is_dir() and any(folder.iterdir()):
            raise ConfigError(f"--output {folder} already holds files; remove them or choose another folder")
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"--output {folder} is a file; choose another folder")
    return folders


def _compare(arguments: list[str]) -> int:
    from rethinker.evaluation.compare import compare_results, describe_comparison

    arguments.remove("--compare")
    options = [argument for argument in arguments if argument.startswith("--")]
    if options:
        raise ConfigError(f"--compare takes result folders and nothing else, not {options[0]}")
    for package in ("scipy", "pyarrow"):
        if find_spec(package) is None:
            raise ConfigError(f"--compare needs the package {package}: {how_to_install(package)}")
    print(describe_comparison(compare_results(arguments)))
    return 0
