"""The geometry of batches: what a step, an episode and a micro-batch are made of, and how long they take at least.

Lengths are not known before a run: the longest are the settings' limits, the likely ones are the caller's assumption.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rethinker.config import Config
from rethinker.plan.memory import MicroBatch, Zero3, lora_parameters, weight_bytes
from rethinker.plan.shapes import Shape

_TEXT_TOKENS = 100  # of a likely prompt, besides its image


@dataclass(frozen=True)
class Traffic:
    """Likely lengths, in tokens."""

    prompt: int
    response: int


@dataclass(frozen=True)
class Geometry:
    """Counts per optimizer step and episode; `likely_*` follow from Traffic."""

    steps_per_episode: int
    queries_per_step: int
    pairs_per_rank: float
    queries_per_rank: float
    likely_tokens_per_step: int
    likely_micro_batches_per_rank: int
    schedule_steps: int | None

    @classmethod
    def of(cls, config: Config, traffic: Traffic, ranks: int, queries: int | None) -> Geometry:
        """Counts for `ranks` ranks and a data set of `queries` questions, if that is known."""
        G, N, E = config.rollout.group_size, config.train.batch_pairs, config.train.episode_queries
        tokens = N // G * _copies(config) * traffic.prompt + N * traffic.response
        steps = config.train.max_steps or (int(config.train.epochs * queries) * G // N if queries else None)
        return cls(
            steps_per_episode=E * G // N,
            queries_per_step=N // G,
            pairs_per_rank=N / ranks,
            queries_per_rank=E / ranks,
            likely_tokens_per_step=tokens,
            likely_micro_batches_per_rank=math.ceil(tokens / (config.train.micro_batch_tokens * ranks)),
            schedule_steps=steps,
        )


def _copies(config: Config) -> int:
    """How often the policy computes a prompt."""
    return config.rollout.group_size if config.policy.attention == "varlen" else 1


def likely_traffic(config: Config, shape: Shape, prompt: int | None, response: int | None) -> Traffic:
    """The caller's assumption; else one image of data.max_pixels and a little text, and a quarter of the longest."""
    image = shape.image_tokens(config.data.max_pixels) if config.data.max_images else 0
    guess = min(config.data.max_prompt_tokens, image + _TEXT_TOKENS)
    return Traffic(prompt or guess, response or max(1, config.rollout.max_new_tokens // 4))


def largest_micro_batch(config: Config, shape: Shape, traffic: Traffic, ranks: int) -> MicroBatch:
    """A full micro-batch, with as many image tokens as prompts may bring.

    A row is full when it reaches train.micro_batch_tokens; one longer sample has a row of its own. Samples from replay
    stand alone behind their prompt, so under `ssr` a prompt at its limit may come with every response of likely length.
    """
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    everything = math.ceil(config.train.batch_pairs * longest / ranks)
    tokens = min(max(config.train.micro_batch_tokens, longest), max(everything, longest))
    images = min(config.data.max_prompt_tokens, config.data.max_images * shape.image_tokens(config.data.max_pixels))
    behind = traffic.response * (1 if config.algorithm.name == "ssr" else config.rollout.group_size)
    share = images / (config.data.max_prompt_tokens + behind)
    group = traffic.prompt + config.rollout.group_size * traffic.response
    return MicroBatch(tokens, tokens, min(tokens, group), math.ceil(tokens * share) * shape.merge**2)


@dataclass(frozen=True)
class Times:
    """Estimated seconds of an optimizer step, its share of the rollout included; no overheads, no waiting."""

    train_flop: float
    train_s: float
    gather_s: float  # of ZeRO-3's collectives; they overlap with the computation in part
    rollout_s: float
    mfu: float
    ahead: bool  # rollouts run beside the training

    @classmethod
    def of(
        cls,
        config: Config,
        shape: Shape,
        traffic: Traffic,
        gpus: int,
        sequences_at_once: float,
        *,
        mfu: float,
        peak_flops: float,
        bandwidth: float,
        network: float,
        local: float,
    ) -> Times:
        """From arithmetic alone.

        Training: 6 FLOP per parameter and token, 8 with gradient checkpointing, and 12 D per layer and attended pair,
        at `mfu` of `peak_flops`; under adapters the frozen weights have no gradients (2 less), and the vision tower no
        backward. ZeRO-3: every micro-batch gathers the weights twice and scatters the gradients, at `network` bytes/s
        per GPU; with hpZ only a step's first gather takes that way, the others the node's `local` one. Sampling: every
        token of every wave reads the engine's weights and the cache of its sequences, at half of `bandwidth`; the
        prompts are computed once, at `mfu`.
        """
        G, N = config.rollout.group_size, config.train.batch_pairs
        queries, tp, b = N // G, config.rollout.tensor_parallel_size, weight_bytes(config)
        p, r = traffic.prompt, traffic.response
        tokens = queries * _copies(config) * p + N * r
        pairs = queries * _copies(config) * p * p / 2 + N * (r * p + r * r / 2)
        patches = queries * max(0, p - _TEXT_TOKENS) * shape.merge**2
        passes = 8 if config.policy.gradient_checkpointing else 6
        text, seen, adapters = (
            (passes - 2, 2, lora_parameters(config, shape)) if config.policy.lora.rank else (passes, passes, 0)
        )
        linear = (text * shape.text_parameters + passes * adapters) * tokens + seen * shape.vision_parameters * patches
        flop = linear + 2 * passes * shape.layers * shape.heads * shape.head_dim * pairs

        engines = max(1, gpus // tp)
        sequences = N / engines
        at_once = max(1.0, min(sequences, sequences_at_once))
        cache = kv_bytes_per_token(config, shape) * (p / G + r / 2)  # a group shares its prompt's
        read = b * shape.text_parameters / tp + at_once * cache
        decode = math.ceil(sequences / at_once) * r * read / (bandwidth / 2)
        prompts = 2 * (shape.text_parameters * queries * p + shape.vision_parameters * patches)
        prefill = prompts / (gpus * peak_flops * mfu)
        micro_batches = math.ceil(tokens / (config.train.micro_batch_tokens * gpus))
        away = b * (gpus - 1) / gpus  # of a parameter, on other GPUs
        gather, scatter = away * (shape.parameters + adapters), away * (adapters or shape.parameters)
        within = 2 * micro_batches - 1 if Zero3.of(config, on_gpu=True).node_copy > 1 else 0  # gathers
        between = gather * (2 * micro_batches - within) + scatter * micro_batches
        moved = between / network + gather * within / local
        ahead = config.rollout.max_staleness > 0
        return cls(flop, flop / (gpus * peak_flops * mfu), moved, decode + prefill, mfu, ahead)

    @property
    def step_s(self) -> float:
        """At least: the collectives hide behind the computation, or it behind them."""
        training = max(self.train_s, self.gather_s)
        return max(training, self.rollout_s) if self.ahead else training + self.rollout_s


def kv_bytes_per_token(config: Config, shape: Shape) -> float:
    """Keys and values of a token in one rank's cache; heads are divided among the ranks of an engine, not below one."""
    heads = max(1, shape.kv_heads / config.rollout.tensor_parallel_size)
    return 2 * shape.layers * heads * shape.head_dim * weight_bytes(config)
