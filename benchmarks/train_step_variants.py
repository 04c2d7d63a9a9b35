"""The ways to take the same training step that `benchmarks.train_step` compares, each in a process of its own.

A variant is a function (model, workload, settings) -> Prepared: its micro-batches and the loss of one. All of them
leave the same gradients in the model's parameters.
Legend: B samples of a padded micro-batch, L tokens of a row, C response tokens of a row, D hidden size, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import reference
from benchmarks.train_step_workload import Counts, Workload
from rethinker.algorithm.objective import load_loss, loss_inputs, loss_normalizer
from rethinker.config import AlgorithmConfig, PolicyConfig
from rethinker.policy.packing import Bundle, joined, pack, plan_micro_batches
from rethinker.samples import PackedBatch, Sample

ALGORITHM = AlgorithmConfig()
TEMPERATURE = 1.0


@dataclass(frozen=True)
class Settings:
    """What every variant is told."""

    device: str
    dtype: torch.dtype
    micro_batch_tokens: int
    gradient_checkpointing: bool
    peer_attention: str  # of transformers' own layers, in the variants that are not ours


@dataclass
class Prepared:
    """A variant, ready to step."""

    batches: list[Any]  # micro-batches on the host; each has .to(device)
    loss: Callable[[Any], Tensor]  # of one of them, on the device; the losses add up to the step's
    counts: Counts  # what a step works through, padding included


# The per-sample layout, as trainers without shared prompts have it


@dataclass
class PaddedBatch:
    """Prompts padded on the left, responses on the right, as TRL and verl lay them out."""

    input_ids: Tensor  # [B, L] int64
    attention_mask: Tensor  # [B, L] int64
    position_ids: Tensor  # [3, B, L] int64
    pixel_values: Tensor  # [patches, channels * patch area]: one copy of its image per sample
    image_grid_thw: Tensor  # [B, 3] int64
    response_ids: Tensor  # [B, C] int64
    mask: Tensor  # [B, C] bool
    old_logps: Tensor  # [B, C] fp32
    advantages: Tensor  # [B] fp32

    def to(self, device: str) -> PaddedBatch:
        return PaddedBatch(**{name: tensor.to(device, non_blocking=True) for name, tensor in vars(self).items()})


def padded(model: nn.Module, workload: Workload, settings: Settings) -> tuple[list[PaddedBatch], Counts]:
    """Padded micro-batches of at most `micro_batch_tokens`, padding included (one sample at least).

    Responses of like length share a micro-batch, which wastes less than taking samples as they come (measured: 22%
    instead of 32% of the tokens at the GPU's default), and positions are computed here, ahead of the step.
    """
    batches: list[list[Sample]] = []
    longest_prompt = longest_response = 0
    for sample in sorted(workload.samples, key=lambda s: (-len(s.completion.token_ids), -s.prompt_tokens)):
        longest_prompt = max(longest_prompt, sample.prompt_tokens)
        longest_response = max(longest_response, len(sample.completion.token_ids))
        size = len(batches[-1]) + 1 if batches else 1
        if not batches or size * (longest_prompt + longest_response) > settings.micro_batch_tokens:
            batches.append([])
            longest_prompt, longest_response = sample.prompt_tokens, len(sample.completion.token_ids)
        batches[-1].append(sample)
    made = [_pad(model, workload, samples) for samples in batches]
    counts = Counts()
    for batch in made:
        (B, L), C = batch.input_ids.shape, batch.response_ids.shape[1]
        counts += Counts(B * L, B * C, len(batch.pixel_values), B * L * (L + 1) // 2)
    return made, counts


def _pad(model: nn.Module, workload: Workload, samples: list[Sample]) -> PaddedBatch:
    prompts = [workload.encode(sample.query).token_ids for sample in samples]
    responses = [sample.completion.token_ids.tolist() for sample in samples]
    P, C = max(map(len, prompts)), max(map(len, responses))
    ids, attention = (torch.zeros(len(samples), P + C, dtype=torch.int64) for _ in range(2))
    response_ids = torch.zeros(len(samples), C, dtype=torch.int64)
    old_logps = torch.zeros(len(samples), C)
    for b, (prompt, response, sample) in enumerate(zip(prompts, responses, samples, strict=True)):
        end = P + len(response)
        ids[b, P - len(prompt) : end] = torch.tensor(prompt + response)
        attention[b, P - len(prompt) : end] = 1
        response_ids[b, : len(response)] = torch.tensor(response)
        old_logps[b, : len(response)] = torch.tensor(sample.completion.logprobs)
    images = joined([workload.pixels(sample.query) for sample in samples])
    grid = images["image_grid_thw"]
    is_image = (ids == model.config.image_token_id).int()
    return PaddedBatch(
        input_ids=ids,
        attention_mask=attention,
        position_ids=model.model.get_rope_index(ids, is_image, grid, attention_mask=attention)[0],
        **images,
        response_ids=response_ids,
        mask=attention[:, P:].bool(),
        old_logps=old_logps,
        advantages=torch.tensor([sample.advantage for sample in samples]),
    )


def _inputs(batch: PaddedBatch) -> dict[str, Any]:
    names = ("input_ids", "attention_mask", "position_ids", "pixel_values", "image_grid_thw")
    return {name: getattr(batch, name) for name in names} | {"use_cache": False}


def plain_loss(logits: Tensor, response_ids: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, normalizer):
    """The loss in plain PyTorch from logits [B, C, V]; the rest as in `PaddedBatch`."""
    logps = reference.selective_log_softmax(logits, response_ids, temperature=TEMPERATURE)
    return reference.grpo_loss(
        logps.flatten(),
        old_logps.flatten(),
        advantages.repeat_interleave(logps.shape[1]),
        mask=mask.flatten(),
        clip_low=ALGORITHM.clip_low,
        clip_high=ALGORITHM.clip_high,
        normalizer=normalizer,
    )[0]


def _peer(model: nn.Module, settings: Settings) -> None:
    """Transformers' model as a trainer sets it up."""
    model.set_attn_implementation({"text_config": settings.peer_attention, "vision_config": settings.peer_attention})
    model.config.use_cache = False
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def eager(model: nn.Module, workload: Workload, settings: Settings, loss: Callable = plain_loss) -> Prepared:
    """Transformers' model, padded batches, whole logits of the response columns (TRL's logits_to_keep)."""
    _peer(model, settings)
    batches, counts = padded(model, workload, settings)
    normalizer = normalizer_of(workload)

    def loss_of(batch: PaddedBatch) -> Tensor:
        C = batch.response_ids.shape[1]
        logits = model(**_inputs(batch), logits_to_keep=C + 1).logits[:, :-1]  # [B, C, V]
        return loss(logits, batch.response_ids, batch.old_logps, batch.advantages, batch.mask, normalizer)

    return Prepared(batches, loss_of, counts)


def compiled(model: nn.Module, workload: Workload, settings: Settings) -> Prepared:
    """`eager` with every decoder layer and the loss through torch.compile, for shapes that vary."""
    for layer in model.model.language_model.layers:
        layer.compile(dynamic=True)
    return eager(model, workload, settings, torch.compile(plain_loss, dynamic=True))


def liger(model: nn.Module, workload: Workload, settings: Settings) -> Prepared:
    """Liger's layers in transformers' model, padded batches, Liger's fused head and GRPO loss."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
    from liger_kernel.transformers import apply_liger_kernel_to_qwen2_5_vl

    if settings.device == "cpu" and not os.environ.get("TRITON_INTERPRET"):
        raise ImportError("liger-kernel's layers are Triton kernels and need a GPU")
    _peer(model, settings)
    apply_liger_kernel_to_qwen2_5_vl(model=model, fused_linear_cross_entropy=False)
    batches, counts = padded(model, workload, settings)
    normalizer = normalizer_of(workload)
    head_loss = LigerFusedLinearGRPOLoss(
        beta=0.0,
        use_ref_model=False,
        loss_type="dapo",
        epsilon_low=ALGORITHM.clip_low,
        epsilon_high=ALGORITHM.clip_high,
        temperature=TEMPERATURE,
        compiled=settings.device != "cpu",
    )

    def loss_of(batch: PaddedBatch) -> Tensor:
        C = batch.response_ids.shape[1]
        hidden = model.model(**_inputs(batch)).last_hidden_state[:, -C - 1 : -1]  # [B, C, D]
        return head_loss(
            hidden,
            model.lm_head.weight,
            batch.response_ids,
            batch.mask.float(),
            batch.advantages,
            old_per_token_logps=batch.old_logps,
            num_items_in_batch=normalizer,
        )[0]

    return Prepared(batches, loss_of, counts)


# This project


def rethinker(
    model: nn.Module, workload: Workload, settings: Settings, *, attention: str = "auto", shared: bool = True
) -> Prepared:
    """This project's policy, packing and fused loss; with `shared=False` every response brings its own prompt."""
    from rethinker.policy.attention import lay_out
    from rethinker.policy.model import Policy

    config = PolicyConfig(attention=attention, gradient_checkpointing=settings.gradient_checkpointing)
    policy = Policy(model, config)
    samples = workload.samples
    if not shared:  # a query of its own for every sample
        samples = [replace(s, query=replace(s.query, id=f"{s.query.id}/{i}")) for i, s in enumerate(samples)]
    (plan,) = plan_micro_batches(samples, budget=settings.micro_batch_tokens, world_size=1)
    batches = [pack(bundles, workload.encode, workload.pixels, policy.positions) for bundles in plan]
    normalizer = normalizer_of(workload)
    counts = Counts()
    for batch, bundles in zip(batches, plan, strict=True):
        tokens = lay_out(batch, policy.kernel).tokens
        pairs = sum(map(_visible_pairs, bundles))
        counts += Counts(tokens, len(batch.target_ids), len(batch.image_inputs["pixel_values"]), pairs)

    def loss_of(batch: PackedBatch) -> Tensor:
        return policy(batch, TEMPERATURE, loss_inputs(load_loss(ALGORITHM), batch, ALGORITHM, normalizer))[0]

    return Prepared(batches, loss_of, counts)


def _visible_pairs(bundle: Bundle) -> int:
    P = bundle.samples[0].prompt_tokens
    lengths = [len(sample.completion.token_ids) - 1 for sample in bundle.samples]
    return P * (P + 1) // 2 + sum(n * P + n * (n + 1) // 2 for n in lengths)


def normalizer_of(workload: Workload) -> float:
    longest = max(len(sample.completion.token_ids) for sample in workload.samples)
    return loss_normalizer(workload.samples, ALGORITHM, longest)


@torch.no_grad()
def behaviour_logps(model: nn.Module, workload: Workload, settings: Settings) -> list[list[float]]:
    """The policy's log-probs of every sample, in the workload's order, by transformers' forward of one at a time."""
    model.set_attn_implementation({"text_config": "sdpa", "vision_config": "sdpa"})
    logps = []
    for sample in workload.samples:
        batch = _pad(model, workload, [sample]).to(settings.device)
        logits = model(**_inputs(batch), logits_to_keep=batch.response_ids.shape[1] + 1).logits[:, :-1]
        logps.append(reference.selective_log_softmax(logits, batch.response_ids, temperature=TEMPERATURE)[0].tolist())
    return logps


VARIANTS: dict[str, Callable[[nn.Module, Workload, Settings], Prepared]] = {
    "eager": eager,
    "torch.compile": compiled,
    "liger": liger,
    "rethinker": rethinker,
    "rethinker per-sample": partial(rethinker, shared=False),
    "rethinker sdpa": partial(rethinker, attention="sdpa"),
}
"""In the order they run; the first one that works is what the others must agree with."""
