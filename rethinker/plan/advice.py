"""What to change when a plan does not fit: each suggestion is planned again, and said only with what that showed."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rethinker.config import Config, ConfigError
from rethinker.plan.build import Machine, Plan, make_plan

_OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": True}}}


@dataclass(frozen=True)
class Suggestion:
    """One change, and the plan with this change alone."""

    option: str  # as on the command line
    plan: Plan


@dataclass(frozen=True)
class Advice:
    """What was found: each change alone, the fewest of them that fit together, and the GPUs that fit unchanged."""

    single: list[Suggestion]
    together: list[str]  # options; empty if none suffice
    gpus: int | None  # with `together` where that is needed too
    gpus_need: list[str]


def advise(plan: Plan, **likely: Any) -> Advice:
    """Search the changes in the order of what they cost the user; `likely` is passed to make_plan."""
    single: dict[str, Suggestion] = {}  # the first value of a setting that fits, else the best one
    for key, value in _changes(plan.config, plan.machine):
        changed = _planned(plan, {key: value}, plan.machine, likely)
        best = single[key].plan if key in single else plan
        if changed and not best.fits and _better(changed, best):
            single[key] = Suggestion(_option(key, value), changed)
    together = _together(plan, plan.machine, likely)
    gpus, need = (None, {}) if together or not plan.machine.gpus else _more_gpus(plan, likely)
    return Advice(
        list(single.values()),
        [_option(*item) for item in together.items()],
        gpus,
        [_option(*item) for item in need.items()],
    )


def _changes(config: Config, machine: Machine) -> Iterator[tuple[str, Any]]:
    """(setting, value) in the order to try them: first what changes neither the result nor the speed by much."""
    if machine.gpus and not config.rollout.sleep:
        yield "rollout.sleep", True
    if machine.gpus and config.policy.dtype == "float32":
        yield "policy.dtype", "bfloat16"
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    tokens = config.train.micro_batch_tokens
    if not config.policy.gradient_checkpointing:
        yield "policy.gradient_checkpointing", True
    while tokens // 2 >= longest:
        tokens //= 2
        yield "train.micro_batch_tokens", tokens
    if machine.gpus and config.rollout.backend == "vllm":
        for tp in (2, 4, 8):
            if config.rollout.tensor_parallel_size < tp <= machine.ranks_per_node:
                yield "rollout.tensor_parallel_size", tp
        share = config.rollout.gpu_memory_utilization
        for percent in sorted(range(10, 95, 5), key=lambda percent: abs(percent / 100 - share)):
            if abs(percent / 100 - share) > 0.01:
                yield "rollout.gpu_memory_utilization", percent / 100
    elif not machine.gpus and config.rollout.backend == "vllm":
        yield "rollout.kv_cache_gb", config.rollout.kv_cache_gb / 2
    if not config.policy.freeze_vision:
        yield "policy.freeze_vision", True
    if config.data.max_images > 2:
        yield "data.max_images", 2
    if machine.gpus:
        yield "train.deepspeed", _OFFLOAD
    yield "rollout.max_new_tokens", config.rollout.max_new_tokens // 2
    if config.algorithm.kl_coef > 0:
        yield "algorithm.kl_coef", 0.0
    if not config.policy.lora.rank:
        yield "policy.lora.rank", 16


def _together(plan: Plan, machine: Machine, likely: dict[str, Any]) -> dict[str, Any]:
    """The fewest changes that fit: taken greedily in order, then those that are not needed taken out again."""
    taken: dict[str, Any] = {}
    best = _planned(plan, {}, machine, likely)
    for key, value in _changes(plan.config, machine):
        if best and best.fits:
            break
        tried = _planned(plan, taken | {key: value}, machine, likely)
        if tried and (best is None or tried.fits or _better(tried, best)):
            taken, best = taken | {key: value}, tried
    if not (best and best.fits):
        return {}
    for key in list(taken):
        without = {other: value for other, value in taken.items() if other != key}
        tried = _planned(plan, without, machine, likely)
        if tried and tried.fits:
            taken = without
    return taken


def _more_gpus(plan: Plan, likely: dict[str, Any]) -> tuple[int | None, dict[str, Any]]:
    """The fewest GPUs, by doubling, that fit; with changes if it takes them."""
    count = plan.machine.gpus
    while count < 1024:
        count *= 2
        more = dataclasses.replace(plan.machine, gpus=count)
        tried = _planned(plan, {}, more, likely)
        if tried and tried.fits:
            return count, {}
        if found := _together(plan, more, likely):
            return count, found
    return None, {}


def _better(new: Plan, old: Plan) -> bool:
    """Less is missing: summed over all phases, and sequences that fit nowhere count."""
    return _missing(new) < _missing(old)


def _missing(plan: Plan) -> float:
    over = sum(max(0.0, p.bytes - p.limit) for p in (*plan.phases, plan.host, plan.disk) if p.limit is not None)
    return over + plan.rollout.cache_missing


def _planned(plan: Plan, changes: dict[str, Any], machine: Machine, likely: dict[str, Any]) -> Plan | None:
    """The plan with other settings; None where they are not possible."""
    config: Config = copy.deepcopy(plan.config)
    for key, value in changes.items():
        *sections, name = key.split(".")
        section = functools.reduce(getattr, sections, config)
        setattr(section, name, _merged(getattr(section, name), value) if isinstance(value, dict) else value)
    try:
        return make_plan(config, machine, **likely)
    except ConfigError:
        return None


def _merged(base: dict, over: dict) -> dict:
    both = {k: _merged(base.get(k) or {}, v) if isinstance(v, dict) else v for k, v in over.items()}
    return {**base, **both}


def _option(key: str, value: Any) -> str:
    if value is _OFFLOAD:
        return "--train.deepspeed.zero_optimization.offload_optimizer.device cpu"
    return f"--{key} {str(value).lower() if isinstance(value, bool) else value}"
