"""What vLLM's CPU build can do and vLLM 0.32 does not ask of it: kernels in place of several PyTorch operations each,
key-value blocks of 16 tokens, and images whose tokens see each other.

vLLM takes its kernel of norms on GPUs alone, and has its rotary one read one position per token where Qwen-VL has
three. A small model's time depends on the number of operations: with these layers a rollout of the tiny one takes a
seventh less. Of the smaller blocks the responses to a short prompt share one: those to sums take a sixth less again.

Importing this file registers classes in place of vLLM's (`register_oot` and `register_backend`, its interfaces for
other platforms); models that are built later use them. What a kernel does not take is left to vLLM. They are for eager
models, as both engines' are on a CPU.

Legend: T tokens, H query heads, K key heads, E head size, D features.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.mrope import MRotaryEmbedding, apply_interleaved_rope
from vllm.v1.attention.backend import AttentionLayer, CommonAttentionMetadata, MultipleOf
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from rethinker.rollout import vllm_cpu_linear_attention  # noqa: F401  # registers its class

BLOCK = 32  # kernels step by 8 or 16 numbers (of half a head for rotations), some without a check of the remainder


@RMSNorm.register_oot
class KernelRMSNorm(RMSNorm):
    """RMSNorm by one kernel; with a residual in place, as on a GPU."""

    def forward_cpu(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """See RMSNorm: the normalized x [..., D], and x + residual where there is one."""
        whole = self.variance_size_override is None and self.has_weight and x.shape[-1] % BLOCK == 0
        if not (whole and x.dtype == self.weight.dtype and x.is_contiguous()):
            return super().forward_cpu(x, residual)
        weight, kernels = self.weight.data, torch.ops._C
        if residual is None:
            out = torch.empty_like(x)
            kernels.rms_norm(out, x, weight, self.variance_epsilon)
            return out
        if not residual.is_contiguous():
            return super().forward_cpu(x, residual)
        kernels.fused_add_rms_norm(x, residual, weight, self.variance_epsilon)
        return x, residual


@SiluAndMul.register_oot
class InPlaceSiluAndMul(SiluAndMul):
    """silu(a) * b for x = [a, b], the product in place: 4% of a rollout of the tiny model. vLLM's kernel for it takes
    exponentials one by one, five times as long for 256 tokens of 384 features."""

    def forward_cpu(self, x: Tensor) -> Tensor:
        """See SiluAndMul: [..., 2 D] to [..., D]."""
        gate, up = x.chunk(2, dim=-1)
        return silu(gate).mul_(up)


@RotaryEmbedding.register_oot
class EveryHeadRotaryEmbedding(RotaryEmbedding):
    """Rotation of all heads. vLLM's kernel counts them from the last dimension, and so rotates only the first one where
    a model (LFM2) hands heads over as a dimension of their own."""

    def forward_cpu(self, positions: Tensor, query: Tensor, key: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """See RotaryEmbedding: query [T, H E] or [T, H, E], key likewise; a query or key in one piece is rotated in
        place."""
        if query.ndim < 3:
            return super().forward_cpu(positions, query, key)
        rotated = super().forward_cpu(positions, query.flatten(1), None if key is None else key.flatten(1))
        return rotated[0].view(query.shape), None if key is None else rotated[1].view(key.shape)


@MRotaryEmbedding.register_oot
class KernelMRotaryEmbedding(MRotaryEmbedding):
    """Rotation by a token's three positions. All layers of a model share one instance, which makes the cosines and
    sines of a step's tokens once."""

    _positions: Tensor | None = None
    _rows: Tensor  # [T, rotary_dim]
    _places: Tensor  # [T]: each token's row is its own

    def forward_cpu(
        self, positions: Tensor, query: Tensor, key: Tensor | None = None, offsets: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """See MRotaryEmbedding: query [T, H E] and key [T, K E] are rotated in place; positions [3, T]."""
        fits = self.rotary_dim % BLOCK == 0 and query.dtype == self.cos_sin_cache.dtype and query.ndim == 2
        if not fits or positions.ndim == 1:
            return super().forward_cpu(positions, query, key, offsets)
        # Compared by value: those of the next step may lie in the same memory.
        if self._positions is None or not torch.equal(positions, self._positions):
            self._positions, self._rows = positions.clone(), self._cosines_and_sines(positions)
            self._places = torch.arange(len(self._rows))
        torch.ops._C.rotary_embedding(self._places, query, key, self.head_size, self._rows, self.is_neox_style)
        return query, key

    def _cosines_and_sines(self, positions: Tensor) -> Tensor:
        halves = self.cos_sin_cache[positions].chunk(2, dim=-1)  # [3, T, rotary_dim / 2] each
        if self.mrope_interleaved:
            return torch.cat([apply_interleaved_rope(half, self.mrope_section) for half in halves], dim=-1)
        sections = [half.split(self.mrope_section, dim=-1) for half in halves]
        return torch.cat([part[axis] for half in sections for axis, part in enumerate(half)], dim=-1)


class ImageBlocksBuilder(CPUAttentionMetadataBuilder):
    """Where an image's tokens are to see each other both ways, tells `ImageBlocks` of them, too."""

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CPUAttentionMetadata:
        """See AttentionMetadataBuilder."""
        common, places, lengths, ends, rows = common_attn_metadata, [], [], [], []
        made = super().build(common_prefix_len, common, fast_build)
        starts, seen = common.query_start_loc.tolist(), common.seq_lens.tolist()
        for row, images in (common.mm_req_doc_ranges or {}).items():
            first = seen[row] - starts[row + 1] + starts[row]  # position of the first token that is computed now
            for begin, end in images:
                if begin < seen[row] <= end:
                    raise RuntimeError(f"vLLM computes an image's tokens {begin} to {end} up to {seen[row] - 1} only")
                if 0 < self.window_size <= end - begin:
                    raise RuntimeError(
                        f"an image of {end + 1 - begin} tokens is longer than the model's sliding windows "
                        f"({self.window_size}), which vLLM's CPU kernel does not take; set data.max_pixels lower"
                    )
                if first <= end < seen[row]:  # otherwise it has been computed, or will be
                    begin = max(begin, first)
                    places.append(torch.arange(begin, end + 1) - first + starts[row])
                    lengths.append(end + 1 - begin)
                    ends.append(end + 1)
                    rows.append(row)
        if places:
            images = replace(
                common,
                query_start_loc=torch.tensor([0, *lengths]).cumsum(0).int(),
                seq_lens=torch.tensor(ends, dtype=torch.int32),
                num_reqs=len(rows),
                num_actual_tokens=sum(lengths),
                max_query_len=max(lengths),
                max_seq_len=max(ends),
                block_table_tensor=common.block_table_tensor[rows],
                causal=False,
            )
            made.mm_prefix_range = super().build(0, images), torch.cat(places)
        return made


class ImageBlocks(CPUAttentionBackendImpl):
    """Attention by the CPU kernel, and once more for the tokens of images: up to their image's end, not their own.

    A sliding window bounds what is behind a token, and (not causal) as much before it: no image may be longer.
    """

    def forward(
        self,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: Tensor,
        *others: Any,
        **named: Any,
    ) -> Tensor:
        """See AttentionImpl."""
        super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *others, **named)
        # Named as on a GPU: where only the sliding layers have image blocks, vLLM's model takes it from the others.
        if ranges := getattr(attn_metadata, "mm_prefix_range", None):
            images, places = ranges
            part = output[places]
            super().forward(layer, query[places], key, value, kv_cache, images, part)
            output[places] = part
        return output


@register_backend(AttentionBackendEnum.CPU_ATTN)
class SmallBlockAttention(CPUAttentionBackend):
    """Attention over blocks of 16 tokens, too: a kernel takes them, while vLLM names multiples of 32 only.
    `cpu_block_size` keeps them from kernels that do not."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """See AttentionBackend."""
        return ImageBlocks

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        """See AttentionBackend."""
        return ImageBlocksBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: object = None) -> list[int | MultipleOf]:
        """See AttentionBackend."""
        return [MultipleOf(16)]
