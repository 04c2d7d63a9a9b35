"""What a forward and backward keep, counted: the model's own layers run on tensors without data, a few layers deep.

Nothing here is a formula for a transformer. Every tensor that the real modules make is counted while it lives, with one
layer and with two; the difference is what a layer keeps. Only the attention kernel has a stand-in, which saves what
fused kernels save (query, key, value, output, log-sum-exp, and the float mask where SDPA makes one) and takes for a
moment what they take.

Legend: T tokens of a row, B rows of L tokens each, D hidden size, P patches.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rethinker.config import LoraConfig, PolicyConfig
from rethinker.families import family_of
from rethinker.plan.shapes import Shape, meta_model

_ATTENTION = "rethinker_plan"
_VISION = "rethinker_plan_flash"  # "flash": transformers hands a tower's whole row over, see policy/attention.py
_TOKENS, _PATCHES, _WINDOW = 4096, 1024, 64  # counted with these and twice as many; the rest is a straight line
_ROW = 128  # tokens of a row where no mask makes memory grow with it


@dataclass(frozen=True)
class Activations:
    """Bytes per token (of the language model) or per patch (of the vision tower)."""

    kept: float
    """Held from the forward to the backward."""
    extra: float
    """Beyond that, in the worst moment of the backward: a layer's temporaries, or what it computes again."""
    fixed: float
    """Bytes in that moment whatever the number of tokens: gradients of a layer's weights."""
    forward: float
    """Most at once in a forward that keeps nothing."""


class Count(TorchDispatchMode):
    """Bytes of the storages that were made under it: alive now (`bytes`), and most at once (`most`)."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self._meet(tensor.untyped_storage(), made=False)
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._meet(tensor.untyped_storage(), made=True)
        return result

    def _meet(self, storage: torch.UntypedStorage, made: bool) -> None:
        """Count a storage from its first sight to its end, unless it was there before."""
        if storage._cdata not in self._known:
            size = storage.nbytes() if made else 0
            self._known.add(storage._cdata)
            self.bytes += size
            self.most = max(self.most, self.bytes)
            weakref.finalize(storage, self._forget, storage._cdata, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


@functools.lru_cache(maxsize=64)
def text_activations(
    shape: Shape,
    *,
    dtype: str,
    kernel: str,
    row: int,
    checkpointing: bool,
    rank: int = 0,
    targets: tuple[str, ...] = (),
) -> Activations:
    """Of the language model, embedding and head excepted, per token.

    Args:
        shape: the model's.
        dtype: policy.dtype.
        kernel: from policy.attention.kernel_for; the mask of "sdpa" takes `row` entries per token.
        row: L, tokens of a prompt with its responses.
        checkpointing: policy.gradient_checkpointing.
        rank, targets: policy.lora's; then the embedding is frozen, too.
    """
    lora = LoraConfig(rank=rank, target_modules=list(targets))
    row = row if kernel == "sdpa" else _ROW
    most_rows = max(1, _TOKENS // row)

    def run(depth: int, factor: int) -> tuple[float, float, float]:
        rows = factor * most_rows
        language = _policy(shape, dtype, kernel, checkpointing, depth, lora).model.language_model
        mask = torch.empty(rows, 1, row, row, dtype=torch.bool, device="meta") if kernel == "sdpa" else None
        axes = (3,) if family_of(shape.config.model_type).MROPE else ()
        positions = torch.empty(*axes, rows, row, dtype=torch.int64, device="meta")
        index = torch.empty(rows, row, dtype=torch.int64, device="meta")

        def forward() -> torch.Tensor:
            embeds = torch.empty(rows * row, shape.hidden, dtype=_dtype(dtype), device="meta", requires_grad=not rank)
            keep.append(embeds)
            return language(
                inputs_embeds=embeds.view(rows, row, -1) if kernel == "flash" else embeds[index],
                position_ids=positions,
                attention_mask={"full_attention": mask, "sliding_attention": mask},
                use_cache=False,
            ).last_hidden_state

        keep: list[torch.Tensor] = []
        return _run(language, forward, keep)

    return _per_unit(run, shape.layers, most_rows * row)


@functools.lru_cache(maxsize=64)
def vision_activations(shape: Shape, *, dtype: str, kernel: str, checkpointing: bool) -> Activations:
    """Of the vision tower, its merger included, per patch; arguments as in `text_activations`."""
    if shape.tile:
        return _tile_activations(shape, dtype, kernel, checkpointing)

    def run(depth: int, factor: int) -> tuple[float, float, float]:
        patches = factor * _PATCHES
        cu_seqlens = torch.arange(0, patches + 1, _WINDOW)
        visual = _policy(shape, dtype, kernel, checkpointing, depth).model.visual
        width = shape.vision_hidden // visual.config.num_heads

        def forward() -> torch.Tensor:
            pixels = torch.empty(patches, shape.patch_values, device="meta")
            keep.append(pixels)
            hidden = visual.patch_embed(pixels.to(_dtype(dtype)))
            angles = torch.empty(patches, width, device="meta"), torch.empty(patches, width, device="meta")
            for block in visual.blocks:
                hidden = block(hidden, cu_seqlens=cu_seqlens, position_embeddings=angles)
            return visual.merger(hidden)

        keep: list[torch.Tensor] = []
        return _run(visual, forward, keep)

    return _per_unit(run, shape.vision_layers, _PATCHES)


def _tile_activations(shape: Shape, dtype: str, kernel: str, checkpointing: bool) -> Activations:
    """Of InternVL's vision tower and projector, per patch."""
    tiles = max(1, _PATCHES // shape.tile_patches)
    channels = shape.config.vision_config.num_channels

    def run(depth: int, factor: int) -> tuple[float, float, float]:
        model = _policy(shape, dtype, kernel, checkpointing, depth)
        family = family_of(shape.config.model_type)

        def forward() -> torch.Tensor:
            pixels = torch.empty(factor * tiles, channels, shape.tile, shape.tile, device="meta")
            keep.append(pixels)
            return family.features(model, {"pixel_values": pixels})[0]

        keep: list[torch.Tensor] = []
        return _run(nn.ModuleList(family.vision_modules(model)), forward, keep)

    return _per_unit(run, shape.vision_layers, tiles * shape.tile_patches)


def _run(module: nn.Module, forward: Any, keep: list[torch.Tensor]) -> tuple[float, float, float]:
    """(kept, extra, forward without gradients) of one run, in bytes; `keep` holds what the caller of it holds."""
    for parameter in module.parameters():  # ZeRO-3 takes each gradient away as soon as it is there
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with Count() as count:
        output = forward()
        kept = count.bytes - output.untyped_storage().nbytes()
        count.most = count.bytes
        gradient = torch.empty_like(output)
        keep.clear()
        torch.autograd.backward(output, gradient)
        extra = count.most - kept
    keep.clear()
    del output, gradient
    with Count() as count, torch.no_grad():
        forward()
    return kept, extra, count.most


def _per_unit(run: Any, depth: int, units: int) -> Activations:
    """From runs one and two layers deep, on `units` tokens and on twice as many, to `depth` layers."""
    (kept_1, *_), (kept_2, extra, forward) = run(1, 1), run(2, 1)
    (more_1, *_), (more_2, extra_more, forward_more) = run(1, 2), run(2, 2)
    kept = (more_2 - kept_2) + (depth - 2) * ((more_2 - kept_2) - (more_1 - kept_1))
    slope = max(0.0, extra_more - extra)
    return Activations(kept / units, slope / units, max(0.0, extra - slope), (forward_more - forward) / units)


def _policy(
    shape: Shape, dtype: str, kernel: str, checkpointing: bool, depth: int, lora: LoraConfig | None = None
) -> nn.Module:
    """The model as the policy sets it up, `depth` layers deep, its attention replaced by the stand-in."""
    from transformers import AttentionInterface

    from rethinker.policy.lora import add_adapters
    from rethinker.policy.model import Policy

    AttentionInterface.register(_ATTENTION, functools.partial(_attention, kernel))
    AttentionInterface.register(_VISION, functools.partial(_attention, "varlen"))
    model = meta_model(shape.config, depth=depth, dtype=_dtype(dtype))
    settings = PolicyConfig(dtype=dtype, attention="sdpa", gradient_checkpointing=checkpointing)
    if lora and lora.rank:
        settings.lora = lora
        add_adapters(model, lora, seed=0)
    policy = Policy(model, settings).eval()
    vision = _ATTENTION if kernel == "sdpa" or shape.tile else _VISION
    model.set_attn_implementation({"text_config": _ATTENTION, "vision_config": vision})
    return policy.hf


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


def _attention(
    kernel: str,
    module: nn.Module,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Stand-in for transformers' attention functions: query [B, heads, L, d] to [B, L, heads, d].

    As there, SDPA repeats keys and values under a mask.
    """
    heads = query.shape[1]
    if kernel == "sdpa" and attention_mask is not None and key.shape[1] != heads:
        key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    segments = 0 if cu_seq_lens_q is None else len(cu_seq_lens_q) - 1
    return _Fused.apply(query, key, value, attention_mask, kernel, segments).transpose(1, 2).contiguous(), None


class _Fused(torch.autograd.Function):
    """A fused attention kernel's allocations."""

    @staticmethod
    def forward(ctx, query, key, value, mask, kernel, segments):
        out = torch.empty_like(query)
        if kernel == "flash":
            torch.empty_like(query)  # the part over shared keys, until it is merged
        lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        bias = None if mask is None else query.new_empty(mask.shape)  # SDPA turns a boolean mask into numbers
        ctx.save_for_backward(query, key, value, out, lse, bias)
        ctx.flash, ctx.segments = kernel != "sdpa", segments
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, out, lse, _ = ctx.saved_tensors
        gradients = tuple(torch.empty_like(x) for x in (query, key, value))
        scratch = [torch.empty_like(lse)]
        if ctx.flash:
            # Flash attention adds up the query's gradient in fp32, heads padded to 32 entries and segments by 128
            # tokens (counted where they are short: windows), and the others' for each query head.
            rows, heads, tokens, size = query.shape
            padded = rows * tokens + 128 * ctx.segments, heads, -(-size // 32) * 32
            scratch += [query.new_empty(padded, dtype=torch.float32)]
            scratch += [torch.empty_like(query) for _ in range(2) if key.shape != query.shape]
        del scratch, out
        return *gradients, None, None, None
