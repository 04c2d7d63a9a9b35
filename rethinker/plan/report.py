"""A plan in words and tables, for people and (as JSON) for programs."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, TextIO

from rethinker.plan.advice import Advice
from rethinker.plan.build import Phase, Plan
from rethinker.plan.memory import GIB, Term

_WIDTH = 110  # of a table that is not on a terminal


def print_plan(plan: Plan, advice: Advice | None, recipe: str, file: TextIO | None = None) -> None:
    """Tables on `file` (stdout); plain text where it is not a terminal."""
    from rich.console import Console

    file = file or sys.stdout
    console = Console(file=file, width=None if file.isatty() else _WIDTH, highlight=False)
    shape, machine = plan.shape, plan.machine
    where = f"{machine.gpus} x {machine.gpu_memory / GIB:.0f} GiB GPU" if machine.gpus else "this CPU, one process"

    def print_line(text: str = "") -> None:
        console.print(text, markup=False, soft_wrap=True)

    print_line(f"{recipe}: {shape.name}, {shape.parameters / 1e9:.3g} billion parameters, on {where}")
    _phases_table(console, plan)
    _terms_table(console, plan.host, "--host-memory tells what a node has")
    _terms_table(console, plan.disk, "it is another machine's")
    for line in (*_batch_lines(plan), *_time_lines(plan)):
        print_line(line)
    print_line()
    if plan.fits:
        free = [phase.limit - phase.bytes for phase in plan.phases or [plan.host] if phase.limit is not None]
        print_line(f"It fits; {min(free) / GIB:.1f} GiB are free in the fullest phase." if free else "It fits.")
        return
    for problem in plan.problems:
        print_line(f"Does not fit: {problem}")
    for line in _advice_lines(plan, advice):
        print_line(line)


def as_json(plan: Plan, advice: Advice | None, recipe: str) -> dict[str, Any]:
    """Everything as plain values; sizes in bytes, times in seconds."""

    def phase(phase: Phase) -> dict[str, Any]:
        terms = {term.name: round(term.bytes) for term in phase.terms}
        return {
            "terms": terms,
            "total": round(phase.bytes),
            "limit": phase.limit and round(phase.limit),
            "fits": phase.fits,
        }

    rollout = plan.rollout
    return {
        "recipe": recipe,
        "model": plan.shape.name,
        "parameters": plan.shape.parameters,
        "gpus": plan.machine.gpus,
        "fits": plan.fits,
        "problems": plan.problems,
        "step_moments": {moment.name: round(moment.bytes) for moment in plan.moments},
        "phases": {p.name: phase(p) for p in (*plan.phases, plan.host, plan.disk)},
        "micro_batch": dataclasses.asdict(plan.micro_batch),
        "likely": dataclasses.asdict(plan.traffic),
        "geometry": dataclasses.asdict(plan.geometry),
        "rollout": {
            "cache_tokens": round(rollout.cache_tokens),
            "sequences_at_once": round(rollout.sequences_at_once, 1),
            "waves": rollout.waves,
        },
        "estimated_times": plan.times and dataclasses.asdict(plan.times),
        "advice": advice
        and {
            "single": [{"option": s.option, "fits": s.plan.fits, "problems": s.plan.problems} for s in advice.single],
            "together": advice.together,
            "gpus": advice.gpus,
            "gpus_need": advice.gpus_need,
        },
    }


def _phases_table(console: Any, plan: Plan) -> None:
    """One row per term, one column per phase of a rank."""
    if not plan.phases:
        return
    table = _table("memory of a rank, GiB", *(phase.name for phase in plan.phases), "")
    names: dict[str, Term] = {}
    for phase in plan.phases:
        for term in phase.terms:
            names.setdefault(term.name, term)
    last = [name for name in ("fragmentation", "reserve") if name in names]
    for name in [*(n for n in names if n not in last), *last]:
        held = [next((t for t in phase.terms if t.name == name), None) for phase in plan.phases]
        table.add_row(name, *(_gib(term.bytes) if term else "" for term in held), names[name].note)
    table.add_section()
    table.add_row("total", *(_gib(phase.bytes) for phase in plan.phases), "")
    table.add_row("of", *(_gib(phase.limit) for phase in plan.phases), "")
    table.add_row("", *("fits" if phase.fits else "TOO MUCH" for phase in plan.phases), "")
    console.print(table, markup=False)


def _terms_table(console: Any, phase: Phase, unjudged: str) -> None:
    table = _table(f"{phase.name}, GiB", "", "")
    for term in phase.terms:
        table.add_row(term.name, _gib(term.bytes), term.note)
    table.add_section()
    of = f"not judged: {unjudged}"
    if phase.limit is not None:
        of = f"of {_gib(phase.limit)}: {'fits' if phase.fits else 'TOO MUCH'}"
    table.add_row("total", _gib(phase.bytes), of)
    console.print(table, markup=False)


def _table(title: str, *columns: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False, show_edge=False)
    table.add_column(title, no_wrap=True)
    for column in columns[:-1]:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column(columns[-1], overflow="fold", style="dim")
    return table


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if abs(size) < GIB / 10 else f"{size / GIB:.1f}"


def _batch_lines(plan: Plan) -> list[str]:
    config, batch, rollout = plan.config, plan.micro_batch, plan.rollout
    geometry, traffic, G = plan.geometry, plan.traffic, config.rollout.group_size
    lines = [
        f"episode: {config.train.episode_queries} queries x {G} responses, {geometry.queries_per_rank:g} queries per "
        f"rank, then {geometry.steps_per_episode} optimizer steps",
        f"step: {config.train.batch_pairs} pairs ({geometry.queries_per_step} queries x {G}), "
        f"{geometry.pairs_per_rank:g} per rank; likely {geometry.likely_tokens_per_step:,} tokens "
        f"in {geometry.likely_micro_batches_per_rank} micro-batch(es) per rank "
        f"(assumed: {traffic.prompt} prompt and {traffic.response} response tokens)",
        f"largest micro-batch: {batch.tokens:,} tokens, {batch.patches:,} image patches; beyond what stays it takes, "
        "GiB: " + ", ".join(f"{moment.name} {_gib(moment.bytes)}" for moment in plan.moments) + "; the worst counts",
    ]
    if config.rollout.backend == "vllm":
        lines.append(
            f"rollout: the cache of an engine holds {rollout.cache_tokens:,.0f} tokens, "
            f"{int(rollout.sequences_at_once)} of the longest sequences at once; an episode takes {rollout.waves} "
            "waves of such"
        )
    steps = geometry.schedule_steps
    lines.append(
        f"schedule: {steps} optimizer steps"
        if steps
        else f"schedule: {config.train.epochs:g} epochs x queries x {G} / {config.train.batch_pairs} optimizer steps "
        "(--queries N tells how many)"
    )
    return lines


def _time_lines(plan: Plan) -> list[str]:
    times, machine = plan.times, plan.machine
    if times is None:
        return []
    network = machine.network if machine.nodes > 1 else machine.nvlink
    lines = [
        f"time, estimated and not measured: a step trains {times.train_flop / 1e15:.1f} PFLOP in {times.train_s:.0f} s "
        f"at {machine.mfu:.0%} of {machine.peak_flops / 1e12:.0f} TFLOP/s; ZeRO-3 moves weights and gradients for "
        f"{times.gather_s:.0f} s at {network / 1e9:g} GB/s, at best beside it; the step's share of the rollout takes "
        f"at least {times.rollout_s:.0f} s at {machine.bandwidth / 1e12:g} TB/s"
    ]
    if steps := plan.geometry.schedule_steps:
        lines.append(f"      so {steps} steps take about {steps * times.step_s / 3600:.1f} hours or more")
    return lines


def _effects(old: Plan, new: Plan) -> list[str]:
    """What a change does to the phases that did not fit."""
    pairs = zip((*old.phases, old.host, old.disk), (*new.phases, new.host, new.disk), strict=True)
    said = [f"{a.name} {_gib(a.bytes)} -> {_gib(b.bytes)} GiB" for a, b in pairs if not a.fits and b.bytes < a.bytes]
    if old.rollout.cache_missing > new.rollout.cache_missing:
        lacking = new.rollout.cache_missing
        said.append(f"vLLM's cache lacks {_gib(lacking)} GiB" if lacking else "vLLM's cache suffices")
    return said


def _advice_lines(plan: Plan, advice: Advice | None) -> list[str]:
    if advice is None:
        return []
    lines = ["", "What to change (each alone, planned again):"] if advice.single else []
    for suggestion in advice.single:
        verdict = "fits" if suggestion.plan.fits else "not enough alone"
        lines.append(f"  {suggestion.option}   # {'; '.join([*_effects(plan, suggestion.plan), verdict])}")
    if advice.together:
        lines += ["", "This fits:", "  " + " ".join(advice.together)]
    elif advice.gpus:
        extra = f" with {' '.join(advice.gpus_need)}" if advice.gpus_need else ""
        lines += ["", f"No change of settings fits on {plan.machine.gpus}; {advice.gpus} such GPUs do{extra}"]
    else:
        lines += ["", "No change of settings that is tried here fits; take a smaller model or larger machines."]
    return lines
