"""`rethinker plan RECIPE`: what a run will take, before anything starts. Exit code 0 if it fits, 1 if not."""

from __future__ import annotations

import json
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rethinker.command_line import Parser
from rethinker.config import ConfigError

if TYPE_CHECKING:
    from rethinker.plan.build import Machine, Phase, Plan

_DESCRIPTION = """What a run of RECIPE takes: memory of a rank in each phase, of the host and the disk, the geometry of
batches, and an estimate of time. If something does not fit: which options lessen it. Nothing is loaded or downloaded;
the model's config.json is enough, and the shipped recipes need none. Without --gpus it plans for this machine."""
_GIB = 2**30
_WIDTH = 110  # of a table that is not on a terminal


def main(arguments: Sequence[str]) -> int:
    """Plan and print. Returns 0 if the run fits, 1 if not.

    Raises:
        ConfigError: a mistake in the options, the recipe or the settings.
    """
    options, overrides = _parser().parse_recipe(arguments)
    for name, value in vars(options).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} {value:g} must be above 0")
    if options.mfu is not None and options.mfu > 1:
        raise ConfigError(f"--mfu {options.mfu:g} must be at most 1")
    from rethinker.settings import resolve_config

    config = resolve_config(options.recipe, overrides)  # before anything slow is imported
    from rethinker.plan.build import make_plan

    given = {name: getattr(options, name) for name in ("prompt_tokens", "response_tokens", "queries")}
    plan = make_plan(config, _machine(options, config.run.dir), **given)
    if options.json:
        print(json.dumps(as_json(plan, options.recipe), indent=2))
    else:
        print_plan(plan, options.recipe)
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
    add("--mfu", type=float, metavar="X", help="share of the GPU's peak that training reaches: an assumption [0.4]")
    add("--peak-tflops", type=float, metavar="X", help="dense bf16, of a GPU [989: H100 and H200]")
    add("--bandwidth", type=float, metavar="TB/S", help="of a GPU's memory [3.35: H100]")
    add("--network", type=float, metavar="GB/S", help="of a GPU to other nodes [50: 400 Gbit/s]")
    add("--json", action="store_true", help="print all of it as JSON")
    return parser


def _machine(options: Namespace, run_dir: str) -> Machine:
    """The machine that the options describe, or this one."""
    from rethinker.plan.build import Machine

    gpus, memory, host, disk = options.gpus, options.gpu_memory, options.host_memory, None
    if gpus is None:
        if memory is not None:
            raise ConfigError(f"--gpu-memory {memory:g} needs --gpus: how many of them")
        import torch

        from rethinker.doctor import memory_gb

        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if gpus:
            memory = torch.cuda.get_device_properties(0).total_memory / _GIB
        host = host or memory_gb()
        folder = Path(run_dir).expanduser().absolute()
        disk = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    speeds = {"mfu": (options.mfu, 1), "peak_flops": (options.peak_tflops, 1e12)}
    speeds |= {"bandwidth": (options.bandwidth, 1e12), "between_nodes": (options.network, 1e9)}
    given = {name: value * unit for name, (value, unit) in speeds.items() if value is not None}
    memory = (memory or 80.0) * _GIB
    return Machine(gpus, memory, options.gpus_per_node, host and host * _GIB, disk, **given)


def as_json(plan: Plan, recipe: str) -> dict[str, Any]:
    """Everything as plain values; sizes in bytes, times in seconds."""
    from rethinker.plan.build import remedies

    phases = {
        phase.name: {
            "terms": {term.name: term.bytes for term in phase.terms},
            "total": phase.bytes,
            "limit": phase.limit,
            "fits": phase.fits,
        }
        for phase in plan.phases
    }
    return {
        "recipe": recipe,
        "model": plan.shape.name,
        "parameters": plan.shape.parameters,
        "gpus": plan.machine.gpus,
        "fits": plan.fits,
        "problems": list(plan.problems.values()),
        "advice": {problem: remedies(plan, problem) for problem in plan.problems},
        "phases": phases,
        "step_moments": {moment.name: moment.bytes for moment in plan.moments},
        "batches": asdict(plan.batches),
        "rollout": asdict(plan.rollout),
        "estimated_times": plan.times and asdict(plan.times),
    }


def print_plan(plan: Plan, recipe: str) -> None:
    """Tables and sentences; plain text where the output is no terminal."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False, markup=False)
    shape, machine = plan.shape, plan.machine
    where = f"{machine.gpus} x {machine.gpu_memory / _GIB:.0f} GiB GPU" if machine.gpus else "this CPU, one process"
    console.print(f"{recipe}: {shape.name}, {shape.parameters / 1e9:.3g} billion parameters, on {where}")
    if plan.device:
        console.print(_table("memory of a rank, GiB", plan.device))
    for phase in (plan.host, plan.disk):
        console.print(_table(f"{phase.name}, GiB", [phase]))
    for line in _lines(plan):
        console.print(line, soft_wrap=True)


def _table(title: str, phases: Sequence[Phase]) -> Any:
    """One row per term, one column per phase."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False, show_edge=False)
    table.add_column(title, no_wrap=True)
    for phase in phases:
        table.add_column(phase.name if len(phases) > 1 else "", justify="right", no_wrap=True)
    table.add_column("", overflow="fold", style="dim")
    terms = {term.name: term for phase in phases for term in phase.terms}
    for name in sorted(terms, key=lambda name: name in ("fragmentation", "reserve")):  # these last
        sizes = [next((_gib(term.bytes) for term in phase.terms if term.name == name), "") for phase in phases]
        table.add_row(name, *sizes, terms[name].note)
    table.add_section()
    table.add_row("total", *(_gib(phase.bytes) for phase in phases))
    if phases[0].limit is not None:
        table.add_row("of", *(_gib(phase.limit) for phase in phases))
        table.add_row("", *("fits" if phase.fits else "TOO MUCH" for phase in phases))
    return table


def _gib(size: float) -> str:
    return f"{size / _GIB:.2f}" if size < _GIB / 10 else f"{size / _GIB:.1f}"


def _lines(plan: Plan) -> Iterator[str]:
    """Batches, times and the verdict."""
    from rethinker.plan.build import remedies

    train, G, machine, rollout = plan.config.train, plan.config.rollout.group_size, plan.machine, plan.rollout
    batches, times, steps = plan.batches, plan.times, plan.batches.schedule_steps
    moments = ", ".join(f"{moment.name} {_gib(moment.bytes)}" for moment in plan.moments)
    yield f"episode: {train.episode_queries} queries x {G} responses, then {batches.steps_per_episode} optimizer steps"
    yield (
        f"step: {train.batch_pairs} pairs ({batches.queries_per_step} queries x {G}), "
        f"{train.batch_pairs / machine.ranks:g} per rank; likely {batches.likely_tokens_per_step:,} tokens in "
        f"{batches.likely_micro_batches_per_rank} micro-batch(es) per rank (assumed: {batches.prompt} prompt and "
        f"{batches.response} response tokens)"
    )
    yield (
        f"largest micro-batch: {batches.largest.tokens:,} tokens, {batches.largest.patches:,} image patches; beyond "
        f"what stays it takes, GiB: {moments}; the worst counts"
    )
    if rollout.cache_tokens:
        yield (
            f"rollout: the cache of an engine holds {rollout.cache_tokens:,.0f} tokens, "
            f"{int(rollout.sequences_at_once)} of the longest sequences at once; an episode takes {rollout.waves} waves"
        )
    unknown = f"{train.epochs:g} epochs x queries x {G} / {train.batch_pairs}"
    yield f"schedule: {steps or unknown} optimizer steps" + ("" if steps else " (--queries N gives their number)")
    if times:
        yield (
            f"time, estimated and not measured: a step trains {times.train_flop / 1e15:.1f} PFLOP in "
            f"{times.train_s:.0f} s at {machine.mfu:.0%} of {machine.peak_flops / 1e12:.0f} TFLOP/s; ZeRO-3 moves "
            f"weights and gradients for {times.gather_s:.0f} s at {machine.network / 1e9:g} GB/s, at best beside it; "
            f"the step's share of the rollout takes at least {times.rollout_s:.0f} s"
        )
        if steps:
            yield f"      so {steps} steps take about {steps * times.step_s / 3600:.1f} hours or more"
    yield ""
    free = [phase.limit - phase.bytes for phase in plan.device or [plan.host] if phase.limit is not None]
    if plan.fits:
        yield f"It fits; {_gib(min(free))} GiB are free in the fullest phase." if free else "It fits."
    for problem, words in plan.problems.items():
        yield f"Does not fit: {words}"
        yield f"  What would help: {'; '.join(remedies(plan, problem)) or 'a smaller model or larger machines'}"
