"""The plan of a run: batches, memory in each phase against what there is, and advice."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rethinker.config import Config, ConfigError, one_line
from rethinker.plan import memory
from rethinker.plan.memory import GIB, VLLM_WEIGHTS, Budget, Rollout, total
from rethinker.plan.model import Shape, shape_of
from rethinker.plan.step import MicroBatch
from rethinker.rewards.functions import checking_processes

RESERVE = 2.0 * GIB  # CUDA context, NCCL, cuBLAS, and what vLLM keeps while it sleeps; assumed
FRAGMENTATION = 0.05  # of what the trainer allocates; assumed
PROCESS = 4.0 * GIB  # of host memory per rank: Python, CUDA's and vLLM's libraries; assumed
CPU_PROCESS = 1.1 * GIB  # Python, torch, DeepSpeed and vLLM's CPU build in one process; measured, see test_measured.py
CHECKER = 0.25 * GIB  # an answer-checking process; assumed
ENVIRONMENT = 0.1 * GIB  # a process of an environment; 38 MB when it begins, what its code takes is assumed
TEXT_TOKENS = 100  # of a likely prompt, besides its image

_DEVICE = "train.deepspeed (the preset offload), policy.lora.rank, --gpus"
_TRAINING = "policy.gradient_checkpointing, train.micro_batch_tokens"
ADVICE = {
    "training": f"{_TRAINING}, rollout.sleep, {_DEVICE}",
    "rollout": f"rollout.gpu_memory_utilization, {_DEVICE}",
    "weight sync": f"rollout.sleep, rollout.tensor_parallel_size, {_DEVICE}",
    "vLLM's cache": "rollout.gpu_memory_utilization, rollout.tensor_parallel_size, or on a CPU rollout.kv_cache_gb",
    "memory": f"{_TRAINING}, rollout.kv_cache_gb, policy.lora.rank",
    "host": "rollout.tensor_parallel_size, reward.workers",
    "disk": "checkpoint.keep, policy.lora.rank",
}
"""Settings that lessen a problem, first those that change neither the result nor the speed by much."""


@dataclass(frozen=True)
class Machine:
    """What the run is planned for; `gpus` 0 is a CPU with one process."""

    gpus: int
    gpu_memory: float = 80 * GIB  # bytes of a GPU
    gpus_per_node: int = 8
    host_memory: float | None = None  # bytes of a node
    disk: float | None = None  # bytes free at run.dir


@dataclass(frozen=True)
class Batches:
    """A step's batches. Lengths are not known before a run: the longest are the settings' limits, the likely ones one
    image of data.max_pixels with a little text, and a quarter of rollout.max_new_tokens."""

    prompt: int  # likely tokens
    response: int
    tokens: int  # likely, of a step
    micro_batches: int  # likely, of a step on a rank
    largest: MicroBatch  # that a rank may meet


@dataclass(frozen=True)
class Phase:
    """A moment of the run, or the disk: what is held, and of how much."""

    name: str
    budget: Budget
    limit: float | None  # None: not known

    @property
    def bytes(self) -> float:
        return total(self.budget)

    @property
    def fits(self) -> bool:
        return self.limit is None or self.bytes <= self.limit


@dataclass(frozen=True)
class Plan:
    """Everything that `rethinker plan` says about a run."""

    config: Config
    shape: Shape
    batches: Batches
    rollout: Rollout
    phases: list[Phase]

    @property
    def problems(self) -> dict[str, str]:
        """What does not fit: {phase or "vLLM's cache": in words}."""
        sizes = {p.name: f"{p.name}: {p.bytes / GIB:.1f} GiB of {p.limit / GIB:.1f}" for p in self.phases if not p.fits}
        if self.rollout.budget and not self.rollout.waves:
            words = f"its {self.rollout.cache_tokens:,.0f} tokens are less than one prompt and response may have"
            sizes["vLLM's cache"] = f"vLLM's cache: {words}"
        return sizes


def make_plan(config: Config, machine: Machine) -> Plan:
    """Plan a run.

    Raises:
        ConfigError: no config.json, or a rollout.tensor_parallel_size that fits neither the ranks nor the model.
    """
    ranks, on_gpu = max(1, machine.gpus), machine.gpus > 0
    here = min(ranks, machine.gpus_per_node)  # ranks of a node
    shape = shape_of(config.policy, on_gpu)
    heads, tp = shape.text.num_attention_heads, config.rollout.tensor_parallel_size
    if math.gcd(ranks, heads) % tp:
        sizes = [str(n) for n in range(1, ranks + 1) if math.gcd(ranks, heads) % n == 0]
        raise ConfigError(
            f"rollout.tensor_parallel_size={tp} must divide the number of GPUs ({ranks}) and the model's {heads} "
            f"attention heads: {', '.join(sizes)}"
        )
    batches = batches_of(config, shape, ranks)
    state, offloaded = memory.training_state(config, shape, ranks, on_gpu)
    try:
        step = memory.step_peak(config, shape, batches.largest, ranks, on_gpu)
    except RuntimeError as error:  # of parts whose sizes do not fit
        raise ConfigError(
            f"policy.model={config.policy.model}: a step of the model that its config.json describes cannot be "
            f"computed: {one_line(error)}"
        ) from error
    rollout = memory.rollout_of(config, shape, ranks, machine.gpu_memory if on_gpu else None)
    sync = memory.sync_peak(shape) if rollout.budget else {}
    b, keep = shape.weight_bytes, config.checkpoint.keep
    host = {"answer checkers (assumed)": here * checking_processes(config.reward) * CHECKER}
    if set(config.environment.use) - {"crop", "verify"}:
        host["environment's processes (assumed)"] = here * config.environment.workers * ENVIRONMENT
    host["a checkpoint's weights, on rank 0's node"] = b * shape.parameters
    if on_gpu:
        # An engine that sleeps takes nothing while the policy trains, and wakes for a weight sync without its cache.
        asleep = {VLLM_WEIGHTS: rollout.budget[VLLM_WEIGHTS]} if rollout.sleeps else {}
        beside, awake = ({}, asleep) if rollout.sleeps else (rollout.budget, rollout.budget)
        reserve = {"CUDA context, NCCL, cuBLAS (assumed)": RESERVE}
        lost = {"fragmentation (assumed)": FRAGMENTATION * (total(state) + total(step))}
        host |= {name: here * size for name, size in (offloaded | asleep).items()}
        host["processes (assumed)"] = here * PROCESS
        phases = [
            Phase("training", state | step | beside | lost | reserve, machine.gpu_memory),
            Phase("rollout", state | rollout.budget | reserve, machine.gpu_memory),
            Phase("weight sync", state | awake | sync | reserve, machine.gpu_memory),
            Phase("host", host, machine.host_memory),
        ]
    else:
        host |= state | offloaded | rollout.budget | max(step, sync, key=total) | {"the process": CPU_PROCESS}
        phases = [Phase("memory", host, machine.host_memory)]
    model = b * (shape.parameters + shape.adapters)
    moving = b * shape.trained if config.algorithm.reference_every else 0
    disk = {"checkpoints to resume from": (keep + 1) * (model + 12 * shape.trained + moving)}  # and one being written
    disk["best and last model"] = 2 * model
    return Plan(config, shape, batches, rollout, [*phases, Phase("disk", disk, machine.disk)])


def batches_of(config: Config, shape: Shape, ranks: int) -> Batches:
    """The batches of a run.

    The largest micro-batch is a full one, with as many image tokens as prompts and, with an environment, responses may
    hold. A row is full when it reaches train.micro_batch_tokens; one longer sample has a row of its own. Samples from
    replay stand alone behind their prompt, so under `ssr` a prompt at its limit may come with every response of likely
    length.
    """
    G, N, data = config.rollout.group_size, config.train.batch_pairs, config.data
    image = shape.image_tokens(data.max_pixels)
    prompt = min(data.max_prompt_tokens, (image if data.max_images else 0) + TEXT_TOKENS)
    response = max(1, config.rollout.max_new_tokens // 4)
    longest = data.max_prompt_tokens + config.rollout.max_new_tokens
    tokens = max(longest, min(config.train.micro_batch_tokens, math.ceil(N * longest / ranks)))
    environment = config.environment
    seen = min(config.rollout.max_new_tokens, environment.max_images * image) if environment.use else 0  # in a response
    shown, behind = min(data.max_prompt_tokens, data.max_images * image), 1 if config.algorithm.name == "ssr" else G
    share = (shown + behind * seen) / (data.max_prompt_tokens + behind * max(response, seen))
    likely = N // G * prompt + N * response
    return Batches(
        prompt,
        response,
        likely,
        math.ceil(likely / (config.train.micro_batch_tokens * ranks)),
        MicroBatch(tokens, tokens, prompt, response, min(tokens, prompt + G * response), math.ceil(tokens * share)),
    )
