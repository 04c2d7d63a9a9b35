"""A training step on tensors without data: the real policy runs forward and backward, and its allocations are counted.

Nothing here is a formula for a transformer. What needs data has a stand-in that allocates as much: the attention
kernel, the products of a layer's experts, the loss head, and ZeRO-3, which takes each gradient away.

Legend: T tokens of the packed row, R rows of the loss head, V vocabulary, D hidden size.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rethinker.plan.model import Shape
from rethinker.policy.recurrent import CHUNK

_TEXT = "rethinker_plan"
_VISION = "rethinker_plan_flash"  # "flash": transformers hands a tower's whole row over, see policy/attention.py


@dataclass(frozen=True)
class MicroBatch:
    """What a rank computes at a time."""

    tokens: int  # T
    rows: int  # R
    prompt: int  # tokens of a prompt, and of each of its responses
    response: int
    row: int  # tokens of a prompt with its responses: what SDPA's mask is quadratic in
    image_tokens: int

    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The prompt and the response (0: the prompt) of each token, [T] each."""
        place = torch.arange(self.tokens)
        own = place % self.row
        return place // self.row, torch.where(own < self.prompt, 0, 1 + (own - self.prompt) // self.response)


class Count(TorchDispatchMode):
    """Bytes of a device's storages that were made under it: alive now, and most at once with the moment of that."""

    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        self.bytes = self.most = 0
        self.moment = self.worst = "forward"
        self._device, self._known = device, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = self._storages(result)
        if made.keys() - self._known:
            for key in made.keys() - self._known - self._storages((args, kwargs)).keys():
                size = made[key].nbytes()
                self._known.add(key)
                self.bytes += size
                if self.bytes > self.most:
                    self.most, self.worst = self.bytes, self.moment
                weakref.finalize(made[key], self._forget, key, size)
        return result

    def _storages(self, tree: Any) -> dict[int, torch.UntypedStorage]:
        tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
        storages = (tensor.untyped_storage() for tensor in tensors if tensor.device.type == self._device)
        return {storage._cdata: storage for storage in storages}

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


def count_step(shape: Shape, batch: MicroBatch, *, chunk: int, bucket: int) -> dict[str, float]:
    """Bytes that a micro-batch takes beyond what stays: activations, and what its worst moment adds to them.

    Args:
        shape: its policy gets stand-ins and is of no use afterwards.
        batch: the micro-batch.
        chunk: bytes of the logits that the loss head holds at a time.
        bucket: elements of ZeRO-3's gradient bucket: a full one is copied to be scattered, a larger gradient alone.
    """
    from transformers import AttentionInterface  # after rethinker.policy, which repairs torchvision
    from transformers.integrations.moe import ExpertsInterface

    policy, head, made = shape.policy, shape.head, []
    make = functools.partial(torch.empty, device="meta")
    ids = functools.partial(make, dtype=torch.int64)

    def loss(rows: torch.Tensor, *_: Any) -> tuple[torch.Tensor]:
        made.append(count.bytes)
        count.moment = "loss head"
        return (_Head.apply(rows, head, chunk),)

    for name in (_TEXT, _VISION):
        AttentionInterface.register(name, functools.partial(_attention, policy.kernel, shape.on_gpu))
    policy.hf.set_attn_implementation({"text_config": _TEXT, "vision_config": _VISION})
    if policy.routers:
        ExpertsInterface.register(_TEXT, _experts)
        policy.hf.set_experts_implementation(_TEXT)
    policy.family.language_model(policy.hf).register_forward_pre_hook(lambda *_: made.append(count.bytes))
    policy.hf.lm_head.forward = loss
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    sizes = [parameter.numel() for parameter in trained]
    copied = max(*sizes, min(bucket, sum(sizes)))
    if shape.on_gpu and policy.layers.recurrent:
        policy.padded = False
        for module in policy.modules():
            if hasattr(module, "kernels"):
                module.kernels = lambda on_gpu, own=module.kernels: (own(on_gpu)[0], _linear_attention)
    prompt_id, response_id = batch.places()
    with Count() as count:
        packed = SimpleNamespace(  # what Policy.forward reads of a PackedBatch
            tokens=batch.tokens,
            input_ids=ids(1, batch.tokens),
            position_ids=ids(3 if policy.family.MROPE else 1, 1, batch.tokens),
            prompt_id=prompt_id,
            response_id=response_id,
            given=response_id == 0,
            source_index=ids(batch.rows),
            target_ids=ids(batch.rows),
            experts=None,
            image_inputs=shape.images(batch.image_tokens) if batch.image_tokens else {},
        )
        (losses,) = policy(packed)
        count.moment = "backward"
        waits = make(copied, dtype=head.dtype)
        torch.autograd.backward(losses, torch.empty_like(losses))
        del waits
    vision, both = made  # before the language model, and behind it
    activations = {"activations, vision tower": vision, "activations, language model": both - vision}
    return activations | {count.worst: count.most - both}


def _attention(
    kernel: str,
    on_gpu: bool,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
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
    return _Fused.apply(query, key, value, attention_mask, kernel, on_gpu, segments).transpose(1, 2).contiguous(), None


class _Fused(torch.autograd.Function):
    """A fused attention kernel's allocations."""

    @staticmethod
    def forward(ctx, query, key, value, mask, kernel, on_gpu, segments):
        # Laid out token by token; but CUDA's flash attention takes after the query, whose parts may have been joined
        # head by head.
        out = torch.empty_like(query) if on_gpu and kernel == "flash" else _by_token(query)
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
        return *gradients, None, None, None, None


def _by_token(query: torch.Tensor) -> torch.Tensor:
    """An empty tensor of its shape [B, heads, L, d], which is [B, L, heads, d] in memory."""
    return torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def _linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stand-in for flash-linear-attention's chunk_gated_delta_rule; the arguments are those of `Sequences.recur`."""
    state = q.new_empty(1, q.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)  # one run's: few beside a chunk's
    return _Chunks.apply(q, k, v, g, beta, state if initial_state is None else initial_state)


class _Chunks(torch.autograd.Function):
    """The allocations of flash-linear-attention 0.6: it keeps its inputs, normalized, and of each chunk a matrix of its
    tokens by its tokens; the states between chunks are made again for the backward."""

    @staticmethod
    def forward(ctx, q, k, v, g, beta, state):
        q, k, decay = torch.empty_like(q), torch.empty_like(k), torch.empty_like(g, dtype=torch.float32)
        products = k.new_empty(*k.shape[:3], CHUNK)
        _, out = _Chunks._states(k, v), torch.empty_like(v)
        ctx.save_for_backward(q, k, v, decay, beta, products, state)
        return out, torch.empty_like(state)

    @staticmethod
    def backward(ctx, grad, grad_state):
        q, k, v, decay, beta, _, state = ctx.saved_tensors
        made = [_Chunks._states(k, v) for _ in range(2)]  # the states, and their gradients
        gradients = [torch.empty_like(x) for x in (q, k, v, decay, beta, state)]
        del made
        return tuple(gradients)

    @staticmethod
    def _states(k, v):
        """Keys and values as chunks write them, and the state before each chunk."""
        chunks = -(-k.shape[1] // CHUNK)
        states = k.new_empty(len(k), chunks, *k.shape[2:], v.shape[3])
        return torch.empty_like(k), torch.empty_like(v), torch.empty_like(v), states


def _experts(module: nn.Module, hidden: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Stand-in for transformers' grouped products of experts: hidden [X, D], experts and weights [X, k], to [X, D].

    As there, a token is copied for each of its experts, and the copies are sorted by them.
    """
    k = experts.shape[1]
    _, order = experts.flatten().sort()
    inner = _Grouped.apply(hidden[order // k], module.gate_up_proj, module.gate_up_proj.shape[1])
    out = _Grouped.apply(module._apply_gate(inner), module.down_proj, module.down_proj.shape[1])
    out = (out * weights.flatten()[order, None])[torch.empty_like(order)]
    return out.view(len(hidden), k, -1).sum(dim=1).to(hidden.dtype)


class _Grouped(torch.autograd.Function):
    """The allocations of a product with a matrix for each expert, [S, inputs] to [S, outputs]."""

    @staticmethod
    def forward(ctx, rows, weight, outputs):
        ctx.save_for_backward(rows, weight)
        return rows.new_empty(len(rows), outputs)

    @staticmethod
    def backward(ctx, grad):
        rows, weight = ctx.saved_tensors
        return torch.empty_like(rows), torch.empty_like(weight), None


class _Head(torch.autograd.Function):
    """The loss head's allocations: gradients are made in its forward, the weight's in fp32, beside a chunk of logits;
    its backward scales them."""

    @staticmethod
    def forward(ctx, rows, weight, chunk):
        learned = [weight.new_empty(weight.shape, dtype=torch.float32)] if ctx.needs_input_grad[1] else []
        ctx.save_for_backward(torch.empty_like(rows), *learned)
        ctx.dtype = weight.dtype
        rows.new_empty(chunk, dtype=torch.uint8)
        return rows.new_empty(len(rows), dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad):
        rows, *learned = ctx.saved_tensors
        weight = torch.empty_like(learned[0], dtype=ctx.dtype) if learned else None
        return torch.empty_like(rows), weight, None
