"""What a step, an episode and a micro-batch are made of, and how long a step takes at least.

Lengths are not known before a run: the longest are the settings' limits, the likely ones are the caller's assumption.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rethinker.config import Config
from rethinker.plan.memory import MicroBatch, lora_parameters, weight_bytes, zero3
from rethinker.plan.rollout import kv_bytes_per_token
from rethinker.plan.shapes import Shape
from rethinker.policy.throughput import PEAK_FLOPS

_TEXT_TOKENS = 100  # of a likely prompt, besides its image


@dataclass(frozen=True)
class Machine:
    """What the run is planned for; `gpus` 0 is a CPU with one process."""

    gpus: int
    gpu_memory: float  # bytes of a GPU
    gpus_per_node: int
    host_memory: float | None  # bytes of a node
    disk: float | None = None  # bytes free at run.dir
    mfu: float = 0.4
    peak_flops: float = PEAK_FLOPS["H100"]
    bandwidth: float = 3.35e12  # bytes/s of a GPU's memory
    between_nodes: float = 50e9  # bytes/s of a GPU to other nodes
    nvlink: float = 450e9  # and within its node

    @property
    def ranks(self) -> int:
        return max(1, self.gpus)

    @property
    def ranks_per_node(self) -> int:
        return min(self.ranks, self.gpus_per_node)

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.ranks_per_node)

    @property
    def network(self) -> float:
        """Bytes/s at which a GPU exchanges weights with all the others."""
        return self.between_nodes if self.nodes > 1 else self.nvlink


@dataclass(frozen=True)
class Batches:
    """Counts per optimizer step and episode; `likely_*` follow from the likely lengths of a prompt and a response."""

    prompt: int  # tokens, likely
    response: int
    largest: MicroBatch
    steps_per_episode: int
    queries_per_step: int
    likely_tokens_per_step: int
    likely_micro_batches_per_rank: int
    schedule_steps: int | None  # None: not known without the number of questions


def batches_of(
    config: Config, shape: Shape, ranks: int, prompt: int | None, response: int | None, queries: int | None
) -> Batches:
    """The batches of a run on `ranks` ranks with a data set of `queries` questions, if that is known.

    Without likely lengths: one image of data.max_pixels and a little text, and a quarter of rollout.max_new_tokens.

    The largest micro-batch is a full one, with as many image tokens as prompts may hold. A row is full when it reaches
    train.micro_batch_tokens; one longer sample has a row of its own. Samples from replay stand alone behind their
    prompt, so under `ssr` a prompt at its limit may come with every response of likely length.
    """
    G, N, data = config.rollout.group_size, config.train.batch_pairs, config.data
    image = shape.image_tokens(data.max_pixels)
    prompt = prompt or min(data.max_prompt_tokens, (image if data.max_images else 0) + _TEXT_TOKENS)
    response = response or max(1, config.rollout.max_new_tokens // 4)
    longest = data.max_prompt_tokens + config.rollout.max_new_tokens
    everything = math.ceil(N * longest / ranks)
    tokens = min(max(config.train.micro_batch_tokens, longest), max(everything, longest))
    behind = response * (1 if config.algorithm.name == "ssr" else G)
    share = min(data.max_prompt_tokens, data.max_images * image) / (data.max_prompt_tokens + behind)
    likely = N // G * prompt_copies(config) * prompt + N * response
    return Batches(
        prompt,
        response,
        MicroBatch(tokens, tokens, min(tokens, prompt + G * response), math.ceil(tokens * share) * shape.merge**2),
        steps_per_episode=config.train.episode_queries * G // N,
        queries_per_step=N // G,
        likely_tokens_per_step=likely,
        likely_micro_batches_per_rank=math.ceil(likely / (config.train.micro_batch_tokens * ranks)),
        schedule_steps=config.train.max_steps or (int(config.train.epochs * queries) * G // N if queries else None),
    )


def prompt_copies(config: Config) -> int:
    """How often a step computes the prompt of a group."""
    return config.rollout.group_size if config.policy.attention == "varlen" else 1


@dataclass(frozen=True)
class Times:
    """Estimated seconds of an optimizer step, its share of the rollout included; no overheads, no waiting."""

    train_flop: float
    train_s: float
    gather_s: float  # of ZeRO-3's collectives; they overlap with the computation in part
    rollout_s: float
    ahead: bool  # rollouts run beside the training

    @property
    def step_s(self) -> float:
        """At least: the collectives hide behind the computation, or it behind them."""
        training = max(self.train_s, self.gather_s)
        return max(training, self.rollout_s) if self.ahead else training + self.rollout_s


def times_of(config: Config, shape: Shape, batches: Batches, machine: Machine, sequences_at_once: float) -> Times:
    """Seconds of a step on GPUs, from arithmetic alone.

    Training: 6 FLOP per parameter and token, 8 with gradient checkpointing, and 12 D per layer and attended pair, at
    the machine's `mfu`; under adapters the frozen weights have no gradients (2 less), and the vision tower no backward.
    ZeRO-3: every micro-batch gathers the weights twice and scatters the gradients, at the network's speed; with hpZ
    only a step's first gather takes that way, the others NVLink. Sampling: every token of every wave reads the engine's
    weights and the cache of its sequences, at half of the bandwidth; the prompts are computed once, at `mfu`.
    """
    G, N = config.rollout.group_size, config.train.batch_pairs
    queries, tp, b = N // G, config.rollout.tensor_parallel_size, weight_bytes(config)
    p, r, tokens = batches.prompt, batches.response, batches.likely_tokens_per_step
    compute = machine.gpus * machine.peak_flops * machine.mfu

    pairs = queries * prompt_copies(config) * p * p / 2 + N * (r * p + r * r / 2)
    patches = queries * max(0, p - _TEXT_TOKENS) * shape.merge**2
    passes = 8 if config.policy.gradient_checkpointing else 6
    adapters = lora_parameters(config, shape)
    text, seen = (passes - 2, 2) if adapters else (passes, passes)
    linear = (text * shape.text_parameters + passes * adapters) * tokens + seen * shape.vision_parameters * patches
    width = shape.text.num_hidden_layers * shape.text.num_attention_heads * shape.head_dim
    flop = linear + 2 * passes * width * pairs

    sequences = N / max(1, machine.gpus // tp)
    at_once = max(1.0, min(sequences, sequences_at_once))
    cache = kv_bytes_per_token(config, shape) * (p / G + r / 2)  # a group shares its prompt's
    read = b * shape.text_parameters / tp + at_once * cache
    decode = math.ceil(sequences / at_once) * r * read / (machine.bandwidth / 2)
    prefill = 2 * (shape.text_parameters * queries * p + shape.vision_parameters * patches) / compute

    micro_batches = batches.likely_micro_batches_per_rank
    away = b * (machine.gpus - 1) / machine.gpus  # bytes of a parameter that are on other GPUs
    gather, scatter = away * (shape.parameters + adapters), away * (adapters or shape.parameters)
    zero, _ = zero3(config, machine.ranks, on_gpu=True)
    within = 2 * micro_batches - 1 if zero.zero_hpz_partition_size > 1 else 0  # gathers
    between = gather * (2 * micro_batches - within) + scatter * micro_batches
    moved = between / machine.network + gather * within / machine.nvlink
    return Times(flop, flop / compute, moved, decode + prefill, config.rollout.max_staleness > 0)
