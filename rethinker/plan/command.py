"""`rethinker plan RECIPE`: what a run will take, before anything starts. Exit code 0 if it fits, 1 if not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from rethinker.command_line import Parser
from rethinker.config import ConfigError

_DESCRIPTION = """What a run of RECIPE takes: memory of a rank in each phase, of the host and the disk, the geometry of
batches, and an estimate of time. If something does not fit: what to change. Nothing is loaded or downloaded; the
model's config.json (or a table of well-known models) is enough. Without --gpus it plans for this machine."""


def main(arguments: Sequence[str]) -> int:
    """Plan and print. Returns 0 if the run fits, 1 if not.

    Raises:
        ConfigError: a mistake in the options, the recipe or the settings.
    """
    parser = _parser()
    options, overrides = parser.parse_recipe(arguments)
    for name in (
        "gpus",
        "gpu_memory",
        "gpus_per_node",
        "host_memory",
        "peak_tflops",
        "bandwidth",
        "network",
        "queries",
    ):
        value = getattr(options, name)
        if value is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} {value:g} must be above 0")
    if not 0 < options.mfu <= 1:
        parser.error(f"--mfu {options.mfu:g} must be above 0 and at most 1")
    from rethinker.settings import resolve_config

    config = resolve_config(options.recipe, overrides)  # before anything slow is imported
    from rethinker.plan.advice import advise
    from rethinker.plan.build import make_plan
    from rethinker.plan.report import as_json, print_plan

    likely = {
        "prompt_tokens": options.prompt_tokens,
        "response_tokens": options.response_tokens,
        "queries": options.queries,
    }
    plan = make_plan(config, _machine(options, config.run.dir), **likely)
    advice = None if plan.fits else advise(plan, **likely)
    if options.json:
        print(json.dumps(as_json(plan, advice, options.recipe), indent=2))
    else:
        print_plan(plan, advice, options.recipe)
    return 0 if plan.fits else 1


def _parser() -> Parser:
    parser = Parser(
        prog="rethinker plan",
        usage="rethinker plan RECIPE [--gpus N --gpu-memory GIB] [options] [--section.name value ...]",
        description=_DESCRIPTION,
    )
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="a shipped recipe or a .yaml file; settings are overridden as for train")
    add("--gpus", type=int, metavar="N", help="GPUs in all [this machine's; without any, its CPU]")
    add("--gpu-memory", type=float, metavar="GIB", help="memory of each, as nvidia-smi counts [80, or this machine's]")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="[8]")
    add("--host-memory", type=float, metavar="GIB", help="of a node [not judged; on a CPU this machine's]")
    add("--prompt-tokens", type=int, metavar="N", help="likely prompt [one image of data.max_pixels and 100 of text]")
    add("--response-tokens", type=int, metavar="N", help="likely response [a quarter of rollout.max_new_tokens]")
    add("--queries", type=int, metavar="N", help="questions in the data set, for the length of the schedule")
    add("--mfu", type=float, default=0.4, help="share of the GPU's peak that training reaches: an assumption [0.4]")
    add("--peak-tflops", type=float, default=989.0, metavar="X", help="dense bf16, of a GPU [989: H100 and H200]")
    add("--bandwidth", type=float, default=3.35, metavar="TB/S", help="of a GPU's memory [3.35: H100]")
    add("--network", type=float, default=50.0, metavar="GB/S", help="of a GPU to other nodes [50: 400 Gbit/s]")
    add("--json", action="store_true", help="print all of it as JSON")
    return parser


def _machine(options, run_dir: str):
    """The machine asked for, or this one."""
    from rethinker.plan.build import Machine
    from rethinker.plan.memory import GIB

    gpus, memory, host, disk = options.gpus, options.gpu_memory, options.host_memory, None
    if gpus is None:
        if memory is not None:
            raise ConfigError(f"--gpu-memory {memory:g} needs --gpus: how many of them")
        import torch

        from rethinker.doctor import _memory_gb

        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if gpus:
            memory = torch.cuda.get_device_properties(0).total_memory / GIB
        host = host or _memory_gb()
        folder = Path(run_dir).expanduser().absolute()
        disk = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    return Machine(
        gpus=gpus,
        gpu_memory=(memory or 80.0) * GIB,
        gpus_per_node=options.gpus_per_node,
        host_memory=host and host * GIB,
        disk=disk,
        mfu=options.mfu,
        peak_flops=options.peak_tflops * 1e12,
        bandwidth=options.bandwidth * 1e12,
        network=options.network * 1e9,
    )
