"""The plan of a run: its phases on a rank, the host and the disk, each against what there is."""

from __future__ import annotations

from dataclasses import dataclass

from rethinker.config import Config, ConfigError
from rethinker.plan.batches import Geometry, Times, Traffic, largest_micro_batch, likely_traffic
from rethinker.plan.memory import (
    GIB,
    MicroBatch,
    Term,
    lora_parameters,
    step_moments,
    sync_peak,
    total,
    trained_parameters,
    training_state,
    weight_bytes,
    worst,
)
from rethinker.plan.rollout import Rollout, rollout_of
from rethinker.plan.shapes import Shape, shape_of

RESERVE = 2.0 * GIB  # CUDA context, NCCL, cuBLAS, and what vLLM keeps while it sleeps; assumed
FRAGMENTATION = 0.05  # of what the trainer allocates; assumed
PROCESS = 4.0 * GIB  # of host memory per rank: Python, CUDA's and vLLM's libraries; assumed
CPU_PROCESS = 1.1 * GIB  # Python, torch, DeepSpeed and vLLM's CPU build in one process; measured, see test_measured.py
CHECKER = 0.25 * GIB  # an answer-checking process; assumed
TOKEN_BYTES = 8  # of a response: an id and a log-prob (samples.Completion)


@dataclass(frozen=True)
class Machine:
    """What the run is planned for; `gpus` 0 is a CPU, and `ranks` processes share it."""

    gpus: int
    gpu_memory: float  # bytes of a GPU
    gpus_per_node: int
    host_memory: float | None  # bytes of a node
    disk: float | None = None  # bytes free at run.dir
    mfu: float = 0.4
    peak_flops: float = 989e12
    bandwidth: float = 3.35e12  # bytes/s of a GPU's memory
    network: float = 50e9  # bytes/s of a GPU to other nodes
    nvlink: float = 450e9  # and within its node

    @property
    def ranks(self) -> int:
        return max(1, self.gpus)

    @property
    def ranks_per_node(self) -> int:
        return min(self.ranks, self.gpus_per_node) if self.gpus else 1

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.ranks_per_node)


@dataclass(frozen=True)
class Phase:
    """A moment of the run: what is held, and of how much."""

    name: str
    terms: list[Term]
    limit: float | None

    @property
    def bytes(self) -> float:
        return total(self.terms)

    @property
    def fits(self) -> bool:
        return self.limit is None or self.bytes <= self.limit


@dataclass(frozen=True)
class Plan:
    """Everything that `rethinker plan` says about a run."""

    config: Config
    shape: Shape
    machine: Machine
    traffic: Traffic
    micro_batch: MicroBatch
    geometry: Geometry
    moments: list[Term]  # what a training step adds at each moment that may be its worst
    phases: list[Phase]  # on a rank's device
    host: Phase  # on a node; without GPUs the only one
    disk: Phase
    rollout: Rollout
    times: Times | None

    @property
    def problems(self) -> list[str]:
        """What does not fit, in words."""
        said = []
        for phase in (*self.phases, self.host, self.disk):
            if not phase.fits:
                said.append(f"{phase.name}: {phase.bytes / GIB:.1f} GiB of {phase.limit / GIB:.1f}")
        if self.rollout.cache_missing:
            said.append(
                f"rollout: vLLM's cache holds {self.rollout.cache_tokens:,.0f} tokens and lacks "
                f"{self.rollout.cache_missing / GIB:.1f} GiB for one sequence of the longest kind"
            )
        return said

    @property
    def fits(self) -> bool:
        return not self.problems


def make_plan(
    config: Config,
    machine: Machine,
    *,
    prompt_tokens: int | None = None,
    response_tokens: int | None = None,
    queries: int | None = None,
) -> Plan:
    """Plan a run.

    Args:
        config: from `rethinker.settings.resolve_config`.
        machine: what it is to run on.
        prompt_tokens, response_tokens: likely lengths; None assumes some.
        queries: questions in the data set, if known.

    Raises:
        ConfigError: a model without a config, or a tensor_parallel_size that fits neither the ranks nor the model.
    """
    shape = shape_of(config.policy.model)
    _check_parallel(config, shape, machine)
    ranks, on_gpu = machine.ranks, machine.gpus > 0
    traffic = likely_traffic(config, shape, prompt_tokens, response_tokens)
    batch = largest_micro_batch(config, shape, traffic, ranks)
    state, offloaded = training_state(config, shape, ranks, on_gpu)
    moments = step_moments(config, shape, batch, ranks, on_gpu)
    step = worst(moments)
    rollout = rollout_of(config, shape, ranks, machine.gpu_memory if on_gpu else None)
    sync = sync_peak(config, shape) if rollout.terms else []
    times = None
    if on_gpu and not rollout.cache_missing:
        network = machine.network if machine.nodes > 1 else machine.nvlink
        given = {"mfu": machine.mfu, "peak_flops": machine.peak_flops, "bandwidth": machine.bandwidth}
        given |= {"network": network, "local": machine.nvlink}
        likely = rollout.cache_tokens / (traffic.prompt / config.rollout.group_size + traffic.response)
        times = Times.of(config, shape, traffic, ranks, min(rollout.most_sequences, likely), **given)
    phases = _device_phases(machine, state, step, sync, rollout) if on_gpu else []
    return Plan(
        config=config,
        shape=shape,
        machine=machine,
        traffic=traffic,
        micro_batch=batch,
        geometry=Geometry.of(config, traffic, ranks, queries),
        moments=[Term(moment[-1].name, total(moment), moment[-1].note) for moment in moments],
        phases=phases,
        host=_host(config, shape, machine, offloaded, state, step, sync, rollout),
        disk=_disk(config, shape, machine),
        rollout=rollout,
        times=times,
    )


def _device_phases(
    machine: Machine, state: list[Term], step: list[Term], sync: list[Term], rollout: Rollout
) -> list[Phase]:
    """Training, rollout and weight sync. An engine that sleeps takes nothing while the policy trains."""
    reserve = Term("reserve", RESERVE, "CUDA context, NCCL, cuBLAS: assumed")
    lost = Term("fragmentation", FRAGMENTATION * (total(state) + total(step)), f"{FRAGMENTATION:.0%} assumed")
    beside = [] if rollout.sleeps else rollout.terms
    weights = [Term("vLLM's weights", rollout.weights, "awake, without its cache")] if rollout.sleeps else rollout.terms
    return [
        Phase("training", [*state, *step, *beside, lost, reserve], machine.gpu_memory),
        Phase("rollout", [*state, *rollout.terms, reserve], machine.gpu_memory),
        Phase("weight sync", [*state, *weights, *sync, reserve], machine.gpu_memory),
    ]


def _host(
    config: Config,
    shape: Shape,
    machine: Machine,
    offloaded: list[Term],
    state: list[Term],
    step: list[Term],
    sync: list[Term],
    rollout: Rollout,
) -> Phase:
    b, here = weight_bytes(config), machine.ranks_per_node
    group, longest = config.rollout.group_size, config.rollout.max_new_tokens
    kept = config.train.episode_queries * group
    if not config.replay.clear_every_episode:
        kept = max(kept, config.replay.capacity)
    responses = kept * longest * TOKEN_BYTES / machine.nodes
    terms = [
        Term("answer checkers", here * config.reward.workers * CHECKER, f"{here} x {config.reward.workers}: assumed"),
        Term("responses and replay", responses, f"{kept:,} of the longest"),
        Term("a checkpoint's weights", b * shape.parameters, "whole, on rank 0's node, while it is written"),
    ]
    if not machine.gpus:
        terms.insert(0, Term("the process", CPU_PROCESS, "Python, torch, DeepSpeed, vLLM"))
        during = max(total(step), total(sync))
        worst_moment = step if total(step) == during else sync
        terms[1:1] = [*state, *offloaded, *rollout.terms, *worst_moment]
        return Phase("memory", terms, machine.host_memory)
    terms.insert(0, Term("processes", here * PROCESS, f"{here} ranks: assumed"))
    if rollout.sleeps and rollout.weights:
        terms.insert(1, Term("vLLM's weights, asleep", here * rollout.weights, "rollout.sleep, pinned"))
    terms[1:1] = [Term(f"{term.name}, offloaded", here * term.bytes) for term in offloaded]
    return Phase("host memory of a node", terms, machine.host_memory)


def _disk(config: Config, shape: Shape, machine: Machine) -> Phase:
    b = weight_bytes(config)
    model = b * (shape.parameters + lora_parameters(config, shape))
    resumable = model + 12 * trained_parameters(config, shape)
    keep = config.checkpoint.keep
    return Phase(
        "disk",
        [
            # One more than is kept: the oldest goes when the newest is whole.
            Term("checkpoints to resume from", (keep + 1) * resumable, f"{keep} kept, one being written"),
            Term("best and last model", 2 * model, f"{b} bytes per parameter"),
        ],
        machine.disk,
    )


def _check_parallel(config: Config, shape: Shape, machine: Machine) -> None:
    tp = config.rollout.tensor_parallel_size
    if machine.ranks % tp:
        raise ConfigError(f"rollout.tensor_parallel_size={tp} must divide the number of GPUs ({machine.ranks})")
    if shape.heads % tp:
        sizes = [n for n in range(1, shape.heads + 1) if shape.heads % n == 0 and machine.ranks % n == 0]
        raise ConfigError(
            f"rollout.tensor_parallel_size={tp} must divide the model's {shape.heads} attention heads; "
            f"on {machine.ranks} GPUs: {', '.join(map(str, sizes))}"
        )
