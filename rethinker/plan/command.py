"""`rethinker plan RECIPE`: what a run will take, before anything starts. Exit code 0 if it fits, 1 if not."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rethinker.command_line import Parser
from rethinker.config import ConfigError
from rethinker.doctor import memory_gb
from rethinker.settings import resolve_config

if TYPE_CHECKING:
    from rethinker.plan.build import Machine, Phase, Plan

_DESCRIPTION = """What a run of RECIPE takes: memory of a rank in each phase, of the host and the disk, and the
geometry of batches. If something does not fit: which settings lessen it. No weights are loaded or
downloaded; the model's config.json is enough. Without --gpus it plans for this machine."""
_GIB = 2**30


def main(arguments: Sequence[str]) -> int:
    """Plan and print. Returns 0 if the run fits, 1 if not."""
    usage = "rethinker plan RECIPE [--gpus N --gpu-memory GIB] [options] [--section.name value ...]"
    parser = Parser(prog="rethinker plan", usage=usage, description=_DESCRIPTION)
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="a shipped recipe or a .yaml file; settings are overridden as for train")
    add("--gpus", type=int, metavar="N", help="GPUs in all [this machine's; without any, its CPU]")
    add("--gpu-memory", type=float, metavar="GIB", help="memory of each, as nvidia-smi counts [80, or this machine's]")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="[8]")
    add("--json", action="store_true", help="print the bytes of every part as JSON")
    options, overrides = parser.parse_recipe(arguments)
    for name in ("gpus", "gpu_memory", "gpus_per_node"):
        if (value := getattr(options, name)) is not None and value <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} {value:g} must be above 0")
    config = resolve_config(options.recipe, overrides)  # before anything slow is imported
    from rethinker.plan.build import make_plan

    machine = _machine(options, config.run.dir)
    plan = make_plan(config, machine)
    if options.json:
        print(json.dumps({phase.name: {"bytes": phase.budget, "limit": phase.limit} for phase in plan.phases}))
        return 1 if plan.problems else 0
    where = f"{machine.gpus} x {machine.gpu_memory / _GIB:.0f} GiB GPU" if machine.gpus else "this CPU, one process"
    print(f"{options.recipe}: {config.policy.model}, {plan.shape.parameters / 1e9:.3g} billion parameters, on {where}")
    print("", _table(plan.phases), "", *_lines(plan), sep="\n")
    return 1 if plan.problems else 0


def _machine(options: Namespace, run_dir: str) -> Machine:
    """The machine that the options describe, or this one."""
    from rethinker.plan.build import Machine

    if options.gpus is not None:
        return Machine(options.gpus, (options.gpu_memory or 80.0) * _GIB, options.gpus_per_node)
    if options.gpu_memory is not None:
        raise ConfigError(f"--gpu-memory {options.gpu_memory:g} needs --gpus: how many of them")
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    memory = torch.cuda.get_device_properties(0).total_memory if gpus else 0
    folder, host = Path(run_dir).expanduser().absolute(), memory_gb()
    disk = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    return Machine(gpus, memory, options.gpus_per_node, host and host * _GIB, disk)


def _table(phases: Sequence[Phase]) -> str:
    """One row per part, one column per phase, in GiB."""
    import pandas as pd

    table = pd.DataFrame({phase.name: phase.budget for phase in phases}).map(
        lambda size: _gib(size) if size > 0 else ""
    )
    known = {phase.name: phase for phase in phases if phase.limit is not None}
    table.loc["total"] = {phase.name: _gib(phase.bytes) for phase in phases}
    table.loc["of"] = {name: _gib(phase.limit) for name, phase in known.items()}
    table.loc[""] = {name: "fits" if phase.fits else "TOO MUCH" for name, phase in known.items()}
    return table[table.ne("").any(axis=1)].fillna("").rename_axis(columns="GiB").to_string()


def _gib(size: Any) -> str:
    return f"{size / _GIB:.2f}" if size < _GIB / 10 else f"{size / _GIB:.1f}"


def _lines(plan: Plan) -> Iterator[str]:
    """Batches and the verdict."""
    from rethinker.plan.build import ADVICE

    config, batches, rollout = plan.config, plan.batches, plan.rollout
    asked, pairs, G = config.train.episode_queries, config.train.batch_pairs, config.rollout.group_size
    yield f"episode: {asked} queries x {G} responses, then {asked * G // pairs} optimizer steps of {pairs} pairs"
    yield (
        f"step: likely {batches.tokens:,} tokens in {batches.micro_batches} micro-batch(es) per rank (assumed: "
        f"{batches.prompt} prompt and {batches.response} response tokens); the largest micro-batch has "
        f"{batches.largest.tokens:,} tokens, {batches.largest.image_tokens:,} of them of images"
    )
    if rollout.waves:
        yield (
            f"rollout: the cache of an engine holds {rollout.cache_tokens:,.0f} tokens; an episode takes "
            f"{rollout.waves} wave(s) of the longest sequences"
        )
    free = [phase.limit - phase.bytes for phase in plan.phases[:-1] if phase.limit is not None]
    if not plan.problems:
        yield f"It fits; {_gib(min(free))} GiB are free in the fullest phase." if free else "It fits."
    for problem, words in plan.problems.items():
        yield f"Does not fit: {words}. What lessens it: {ADVICE[problem]}"
