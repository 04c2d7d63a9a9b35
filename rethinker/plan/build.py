"""The plan of a run: its phases on a rank, the host and the disk, each against what there is."""

from __future__ import annotations

from dataclasses import dataclass

from rethinker.config import Config, ConfigError
from rethinker.plan.batches import Batches, Machine, Times, batches_of, times_of
from rethinker.plan.memory import (
    GIB,
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
class Phase:
    """A moment of the run, or the disk: what is held, and of how much."""

    name: str
    terms: list[Term]
    limit: float | None  # None: not known

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
    batches: Batches
    moments: list[Term]  # what a training step adds at each moment that may be its worst
    device: list[Phase]  # of a rank; none without GPUs
    host: Phase  # of a node; without GPUs the only memory
    disk: Phase
    rollout: Rollout
    times: Times | None

    @property
    def phases(self) -> list[Phase]:
        """All of them."""
        return [*self.device, self.host, self.disk]

    @property
    def problems(self) -> dict[str, str]:
        """What does not fit: {phase or "vLLM's cache": in words}."""
        sizes = {p.name: f"{p.name}: {p.bytes / GIB:.1f} GiB of {p.limit / GIB:.1f}" for p in self.phases if not p.fits}
        if missing := self.rollout.cache_missing:
            sizes["vLLM's cache"] = (
                f"vLLM's cache: it holds {self.rollout.cache_tokens:,.0f} tokens and lacks {missing / GIB:.1f} GiB "
                "for one sequence of the longest kind"
            )
        return sizes

    @property
    def fits(self) -> bool:
        return not self.problems


def remedies(plan: Plan, problem: str) -> list[str]:
    """Up to three options that lessen a problem, first those that change neither the result nor the speed by much."""
    config, on_gpu, vllm = plan.config, plan.machine.gpus > 0, plan.config.rollout.backend == "vllm"
    tokens, share = config.train.micro_batch_tokens, config.rollout.gpu_memory_utilization
    half = max(config.data.max_prompt_tokens + config.rollout.max_new_tokens, tokens // 2)
    wide, workers, keep = 2 * config.rollout.tensor_parallel_size, config.reward.workers, config.checkpoint.keep
    wider = vllm and plan.machine.ranks_per_node % wide == 0 and plan.shape.text.num_attention_heads % wide == 0
    training = {"training", "memory"}
    device = {"training", "rollout", "weight sync"}
    awake = on_gpu and vllm and not config.rollout.sleep  # then the engine keeps its share in every phase
    split = {"vLLM's cache", "host memory of a node", *([] if awake else ["weight sync"])}
    offers = [
        ("--rollout.sleep true", {"training", "weight sync"}, awake),
        ("--policy.gradient_checkpointing true", training, not config.policy.gradient_checkpointing),
        (f"--train.micro_batch_tokens {half}", training, half < tokens),
        (
            f"--rollout.gpu_memory_utilization {share - 0.1:.2g}",
            device if awake else {"rollout"},
            vllm and share > 0.15,
        ),
        (f"--rollout.gpu_memory_utilization {share + 0.1:.2g}", {"vLLM's cache"}, share < 0.85),
        (f"--rollout.tensor_parallel_size {wide}", split, wider),
        (f"--rollout.kv_cache_gb {config.rollout.kv_cache_gb / 2:g}", {"memory"}, vllm),
        ("--train.deepspeed.zero_optimization.offload_optimizer.device cpu", device, on_gpu),
        ("--policy.lora.rank 16", device | {"memory", "disk"}, not config.policy.lora.rank),
        (f"--gpus {2 * plan.machine.gpus}", device, on_gpu),
        (f"--reward.workers {workers // 2}", {"host memory of a node"}, workers > 1),
        (f"--checkpoint.keep {keep - 1}", {"disk"}, keep > 1),
    ]
    return [option for option, lessens, possible in offers if possible and problem in lessens][:3]


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
    ranks, on_gpu, here = machine.ranks, machine.gpus > 0, machine.ranks_per_node
    batches = batches_of(config, shape, ranks, prompt_tokens, response_tokens, queries)
    state, offloaded = training_state(config, shape, ranks, on_gpu)
    moments = step_moments(config, shape, batches.largest, ranks, on_gpu)
    step = worst(moments)
    rollout = rollout_of(config, shape, ranks, machine.gpu_memory if on_gpu else None)
    sync = sync_peak(config, shape) if rollout.terms else []
    device, times = [], None
    if on_gpu:
        # An engine that sleeps takes nothing while the policy trains, and wakes for a weight sync without its cache.
        reserve = Term("reserve", RESERVE, "CUDA context, NCCL, cuBLAS: assumed")
        lost = Term("fragmentation", FRAGMENTATION * (total(state) + total(step)), f"{FRAGMENTATION:.0%} assumed")
        beside, awake = ([], rollout.terms[:1]) if rollout.sleeps else (rollout.terms, rollout.terms)
        device = [
            Phase("training", [*state, *step, *beside, lost, reserve], machine.gpu_memory),
            Phase("rollout", [*state, *rollout.terms, reserve], machine.gpu_memory),
            Phase("weight sync", [*state, *awake, *sync, reserve], machine.gpu_memory),
        ]
        host = [Term("processes", here * PROCESS, f"{here} ranks: assumed")]
        host += [Term(f"{term.name}, offloaded", here * term.bytes) for term in offloaded]
        if rollout.sleeps:
            host.append(Term("vLLM's weights, asleep", here * rollout.terms[0].bytes, "rollout.sleep, pinned"))
        if not rollout.cache_missing:
            likely = rollout.cache_tokens / (batches.prompt / config.rollout.group_size + batches.response)
            times = times_of(config, shape, batches, machine, min(rollout.most_sequences, likely))
    else:
        process = Term("the process", CPU_PROCESS, "Python, torch, DeepSpeed, vLLM")
        host = [process, *state, *offloaded, *rollout.terms, *max(step, sync, key=total)]
    responses = config.train.episode_queries * config.rollout.group_size
    if not config.replay.clear_every_episode:
        responses = max(responses, config.replay.capacity)
    held = responses * config.rollout.max_new_tokens * TOKEN_BYTES / machine.nodes
    workers, b, keep = config.reward.workers, weight_bytes(config), config.checkpoint.keep
    host += [
        Term("answer checkers", here * workers * CHECKER, f"{here} x {workers}: assumed"),
        Term("responses and replay", held, f"{responses:,} of the longest"),
        Term("a checkpoint's weights", b * shape.parameters, "whole, on rank 0's node, while it is written"),
    ]
    model = b * (shape.parameters + lora_parameters(config, shape))
    resumable = model + 12 * trained_parameters(config, shape)
    disk = [  # One more than is kept: the oldest goes when the newest is whole.
        Term("checkpoints to resume from", (keep + 1) * resumable, f"{keep} kept, one being written"),
        Term("best and last model", 2 * model, f"{b} bytes per parameter"),
    ]
    return Plan(
        config,
        shape,
        machine,
        batches,
        moments=[Term(moment[-1].name, total(moment), moment[-1].note) for moment in moments],
        device=device,
        host=Phase("host memory of a node" if on_gpu else "memory", host, machine.host_memory),
        disk=Phase("disk", disk, machine.disk),
        rollout=rollout,
        times=times,
    )


def _check_parallel(config: Config, shape: Shape, machine: Machine) -> None:
    tp, heads = config.rollout.tensor_parallel_size, shape.text.num_attention_heads
    if machine.ranks % tp:
        raise ConfigError(f"rollout.tensor_parallel_size={tp} must divide the number of GPUs ({machine.ranks})")
    if heads % tp:
        sizes = [n for n in range(1, heads + 1) if heads % n == 0 and machine.ranks % n == 0]
        raise ConfigError(
            f"rollout.tensor_parallel_size={tp} must divide the model's {heads} attention heads; "
            f"on {machine.ranks} GPUs: {', '.join(map(str, sizes))}"
        )
