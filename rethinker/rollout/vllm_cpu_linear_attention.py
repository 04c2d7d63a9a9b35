"""Linear attention of Qwen3.5 in vLLM's CPU build, whose own kernels take bfloat16 and a few sizes of heads alone.

Importing this file registers a class in place of vLLM's, as vllm_cpu_ops.py does, which imports it. It is transformers'
PyTorch functions over the states that vLLM keeps: right, and as fast as a tiny model needs.

Legend: T tokens of a step, C channels of the convolution, W its width, H value heads, E key and V value head size.
"""

from __future__ import annotations

from inspect import unwrap

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen3_5
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn import QwenGatedDeltaNetAttention
from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first

from rethinker.rollout.vllm_weights import convolution_weight

# Unwrapped: where flash-linear-attention is installed, transformers would call its kernels on a CPU, too.
chunk_rule, step_rule = map(unwrap, (qwen3_5.torch_chunk_gated_delta_rule, qwen3_5.torch_recurrent_gated_delta_rule))


@QwenGatedDeltaNetAttention.register_oot
class AnyGatedDeltaNetAttention(QwenGatedDeltaNetAttention):
    """Gated delta rule of any type and size; Qwen3-Next's order of weights is left to vLLM."""

    def forward_cpu(self, hidden_states: Tensor) -> Tensor:
        """See QwenGatedDeltaNetAttention: [T, D] to [T, D]."""
        if self.gqa_interleaved_layout:
            return super().forward_cpu(hidden_states)
        mixed, _ = self.in_proj_qkvz(hidden_states)
        gates, _ = self.in_proj_ba(hidden_states)
        z_size = self.value_dim // self.tp_size
        qkv, z = mixed.split([mixed.shape[1] - z_size, z_size], dim=-1)
        out = qkv.new_zeros(len(qkv), self.num_v_heads // self.tp_size, self.head_v_dim)
        metadata = get_forward_context().attn_metadata
        if metadata is not None:  # none while vLLM measures memory
            self._mix(metadata[self.prefix], qkv, *gates.chunk(2, dim=-1), out)
        return self._output_projection(out, z.unflatten(-1, (-1, self.head_v_dim)))

    def _mix(self, step, qkv: Tensor, b: Tensor, a: Tensor, out: Tensor) -> None:
        """Write the outputs [T, H, V] of a step's sequences, and their states into vLLM's cache."""
        # Of every sequence that vLLM holds: the last inputs [C, W - 1], and what it remembers [H, E, V].
        last, memory = self.kv_cache
        last = last if is_conv_state_dim_first() else last.transpose(1, 2)
        memory = memory.view(*memory.shape[:2], self.head_k_dim, self.head_v_dim)
        weight = convolution_weight(self.conv1d)[:, 0]  # [C, W]
        decay = -self.A_log.float().exp() * F.softplus(a.float() + self.dt_bias)
        beta = b.sigmoid()
        slots, bounds = step.non_spec_state_indices_tensor, step.non_spec_query_start_loc
        decoding = step.num_decodes
        if decoding:  # one token each
            own = slots[:decoding]
            seen = torch.cat([last[own], qkv[:decoding, :, None]], dim=-1)
            last[own] = seen[..., 1:]
            mixed = F.silu((seen * weight).sum(-1))[:, None]  # [sequences, 1, C]
            part, state = step_rule(
                *self._heads(mixed),
                g=decay[:decoding, None],
                beta=beta[:decoding, None],
                initial_state=memory[own],
                output_final_state=True,
                use_qk_l2norm_in_kernel=True,
            )
            out[:decoding], memory[own] = part[:, 0], state.to(memory.dtype)
        for n in range(decoding, decoding + step.num_prefills):
            slot, tokens = slots[n], slice(int(bounds[n]), int(bounds[n + 1]))
            begun = bool(step.has_initial_state[n])
            past = last[slot] if begun else torch.zeros_like(last[slot])
            seen = torch.cat([past, qkv[tokens].T], dim=-1)
            last[slot] = seen[:, 1 - weight.shape[1] :]
            mixed = F.silu(F.conv1d(seen[None], weight[:, None], groups=len(weight))).transpose(1, 2)
            part, state = chunk_rule(
                *self._heads(mixed),
                g=decay[None, tokens],
                beta=beta[None, tokens],
                initial_state=memory[slot][None] if begun else None,
                output_final_state=True,
                use_qk_l2norm_in_kernel=True,
            )
            out[tokens], memory[slot] = part[0], state[0]

    def _heads(self, mixed: Tensor) -> list[Tensor]:
        """Queries and keys [N, L, H, E] and values [N, L, H, V] of the convolution's outputs [N, L, C]."""
        keys = self.key_dim // self.tp_size
        q, k, v = mixed.split([keys, keys, mixed.shape[-1] - 2 * keys], dim=-1)
        groups = self.num_v_heads // self.num_k_heads
        q, k = (part.unflatten(-1, (-1, self.head_k_dim)).repeat_interleave(groups, dim=2) for part in (q, k))
        return [q, k, v.unflatten(-1, (-1, self.head_v_dim))]
