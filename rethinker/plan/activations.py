"""What a forward and backward keep, counted: the model's own layers run on tensors without data, a few layers deep.

Nothing here is a formula for a transformer. Every tensor that the real modules make is counted while it lives, with one
layer and with two; the difference is what a layer keeps. Only the attention kernel has a stand-in, which saves what
fused kernels save and takes for a moment what they take.

Legend: T tokens of a row, B rows of L tokens each, P patches.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rethinker.config import LoraConfig, PolicyConfig
from rethinker.plan.shapes import Shape, depths, meta_model

_TEXT = "rethinker_plan"
_VISION = "rethinker_plan_flash"  # "flash": transformers hands a tower's whole row over, see policy/attention.py
_TOKENS, _PATCHES = 4096, 1024  # counted with these and twice as many; the rest is a straight line
_ROW = 128  # tokens of a row where no mask makes memory grow with it


@dataclass(frozen=True)
class Activations:
    """Bytes per token (of the language model) or per patch (of the vision tower)."""

    kept: float  # from the forward to the backward
    extra: float  # beyond that, in the worst moment of the backward: a layer's temporaries, or what it computes again
    fixed: float  # bytes in that moment whatever the number of tokens: gradients of a layer's weights
    forward: float  # most at once in a forward that keeps nothing


class Count(TorchDispatchMode):
    """Bytes of the storages that were made under it: alive now (`bytes`), and most at once (`most`)."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self._meet((args, kwargs), made=False)
        result = function(*args, **(kwargs or {}))
        self._meet(result, made=True)
        return result

    def _meet(self, tree: Any, made: bool) -> None:
        """Count a storage from its first sight to its end, unless it was there before."""
        for tensor in tree_leaves(tree):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self._known:
                size = storage.nbytes() if made else 0
                self._known.add(storage._cdata)
                self.bytes += size
                self.most = max(self.most, self.bytes)
                weakref.finalize(storage, self._forget, storage._cdata, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


@functools.cache
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
    settings = PolicyConfig(dtype=dtype, gradient_checkpointing=checkpointing, lora=lora)
    row = row if kernel == "sdpa" else _ROW
    rows = max(1, _TOKENS // row)

    def run(depth: int, factor: int) -> tuple[float, float, float]:
        B, policy = factor * rows, policy_without_data(shape, settings, kernel, depth)
        mask = torch.empty(B, 1, row, row, dtype=torch.bool, device="meta") if kernel == "sdpa" else None
        positions = torch.empty(*((3,) if policy.family.MROPE else ()), B, row, dtype=torch.int64, device="meta")
        index = torch.empty(B, row, dtype=torch.int64, device="meta")

        def forward() -> tuple[torch.Tensor, torch.Tensor]:
            made = {"dtype": getattr(torch, dtype), "device": "meta", "requires_grad": not rank}
            embeds = torch.empty(B * row, shape.hidden, **made)  # [T, D]
            output = policy.hf.model.language_model(
                inputs_embeds=embeds.view(B, row, -1) if kernel == "flash" else embeds[index],
                position_ids=positions,
                attention_mask={"full_attention": mask, "sliding_attention": mask},
                use_cache=False,
            )
            return output.last_hidden_state, embeds

        return _run([policy.hf.model.language_model], forward)

    return _per_unit(run, depths(shape.config)[0], rows * row)


@functools.cache
def vision_activations(shape: Shape, *, dtype: str, kernel: str, checkpointing: bool) -> Activations:
    """Of the vision tower, its merger or projector included, per patch; arguments as in `text_activations`."""
    settings = PolicyConfig(dtype=dtype, gradient_checkpointing=checkpointing)
    tiles = max(1, _PATCHES // shape.tile_patches) if shape.tile else 0

    def run(depth: int, factor: int) -> tuple[float, float, float]:
        policy = policy_without_data(shape, settings, kernel, depth)

        def forward() -> tuple[torch.Tensor, Any]:
            if tiles:
                inputs = {"pixel_values": torch.empty(factor * tiles, 3, shape.tile, shape.tile, device="meta")}
            else:
                inputs = {"pixel_values": torch.empty(factor * _PATCHES, shape.patch_values, device="meta")}
                inputs["image_grid_thw"] = torch.tensor([[1, 32, _PATCHES // 32]] * factor)
            return policy.family.features(policy.hf, inputs)[0], inputs

        return _run(policy.family.vision_modules(policy.hf), forward)

    return _per_unit(run, depths(shape.config)[1], tiles * shape.tile_patches or _PATCHES)


def _run(modules: list[nn.Module], forward: Callable[[], tuple[torch.Tensor, Any]]) -> tuple[float, float, float]:
    """(kept, extra, most of a forward without gradients) in bytes; `forward` returns what its caller holds, too."""
    for parameter in nn.ModuleList(modules).parameters():  # ZeRO-3 takes each gradient away as soon as it is there
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with Count() as count:
        output, held = forward()
        kept = count.bytes - output.untyped_storage().nbytes()
        count.most = count.bytes
        gradient = torch.empty_like(output)
        del held
        torch.autograd.backward(output, gradient)
        extra = count.most - kept
    del output, gradient
    with Count() as count, torch.no_grad():
        forward()
    return kept, extra, count.most


def _per_unit(run: Callable[[int, int], tuple[float, float, float]], depth: int, units: int) -> Activations:
    """From runs one and two layers deep, on `units` tokens and on twice as many, to `depth` layers."""
    (kept_1, *_), (kept_2, extra, forward) = run(1, 1), run(2, 1)
    (more_1, *_), (more_2, extra_more, forward_more) = run(1, 2), run(2, 2)
    kept = (more_2 - kept_2) + (depth - 2) * ((more_2 - kept_2) - (more_1 - kept_1))
    slope = max(0.0, extra_more - extra)
    return Activations(kept / units, slope / units, max(0.0, extra - slope), (forward_more - forward) / units)


def policy_without_data(shape: Shape, settings: PolicyConfig, kernel: str, depth: int) -> Any:
    """The policy as training sets it up, `depth` layers deep, its attention replaced by the stand-in."""
    from transformers import AttentionInterface

    from rethinker.policy.lora import add_adapters
    from rethinker.policy.model import Policy

    model = meta_model(shape.config, depth=depth, dtype=getattr(torch, settings.dtype))
    if settings.lora.rank:
        add_adapters(model, settings.lora, seed=0)
    policy = Policy(model, settings).eval()
    for name in (_TEXT, _VISION):
        AttentionInterface.register(name, functools.partial(_attention, kernel))
    model.set_attn_implementation({"text_config": _TEXT, "vision_config": _VISION})
    return policy


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
        if kernel == "flash" and not segments:
            torch.empty_like(query)  # the part over shared keys, until it is merged
        lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        bias = None if mask is None else query.new_empty(mask.shape)  # SDPA turns a boolean mask into numbers
        ctx.save_for_backward(query, key, value, out, lse, bias)
        ctx.flash, ctx.segments = kernel != "sdpa", segments
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, _, lse, _ = ctx.saved_tensors
        gradients = tuple(torch.empty_like(x) for x in (query, key, value))
        scratch = [torch.empty_like(lse)]
        if ctx.flash:
            # Flash attention adds up the query's gradient in fp32, heads padded to 32 entries and segments by 128
            # tokens (counted where they are short: windows), and the others' for each query head.
            rows, heads, tokens, size = query.shape
            padded = rows * tokens + 128 * ctx.segments, heads, -(-size // 32) * 32
            scratch += [query.new_empty(padded, dtype=torch.float32)]
            scratch += [torch.empty_like(query) for _ in range(2) if key.shape != query.shape]
        return *gradients, None, None, None
