"""Qwen3.5, 3.6 and 3.8: three of four decoder layers are linear attention (gated delta rule, arXiv 2412.06464)."""

from __future__ import annotations

from functools import partial
from inspect import unwrap
from types import MethodType
from typing import Any

import torch
from torch.nn import functional as F

from rethinker.config import ConfigError
from rethinker.families import HIDDEN, tiny_text
from rethinker.families.qwen2_vl import tiny_ids
from rethinker.families.qwen3_vl import Qwen3VL, tiny_qwen3_processor, tiny_vision


class Qwen3_5(Qwen3VL):
    """See Family."""

    def prepare(self, model: torch.nn.Module) -> None:
        text = model.config.get_text_config()
        if text.linear_num_value_heads % text.linear_num_key_heads:
            raise ConfigError(
                f"policy.model: its linear_num_value_heads={text.linear_num_value_heads} is no multiple of "
                f"linear_num_key_heads={text.linear_num_key_heads}; correct its config.json"
            )
        for layer in self.language_model(model).layers:
            if hasattr(layer, "linear_attn"):
                layer.linear_attn.forward = MethodType(gated_delta_net, layer.linear_attn)
                layer.linear_attn.kernels = library
                # It is called as a module, as transformers does not: hooks of ZeRO-3 around the call gather its weight.
                layer.linear_attn.conv1d.forward = MethodType(_convolve, layer.linear_attn.conv1d)

    def tail(self, text_config: Any) -> int | None:
        return text_config.linear_conv_kernel_dim - 1

    def state(self, text_config: Any, size: int) -> int:
        """See Family: each layer's key by value matrices, in fp32, and the last inputs of its convolution."""
        keys, values = text_config.linear_num_key_heads, text_config.linear_num_value_heads
        key, value = text_config.linear_key_head_dim, text_config.linear_value_head_dim
        channels = 2 * keys * key + values * value
        layers = text_config.layer_types.count("linear_attention")
        return layers * (4 * values * key * value + size * channels * self.tail(text_config))

    def draw(self, name: str, values: torch.Tensor) -> None:
        """See Family. transformers would mostly draw decays to nothing within a token, of which its fp32 gradient is
        wrong by 5e-4; these leave a memory of several."""
        if name.endswith(".A_log"):
            torch.nn.init.uniform_(values, -4.0, 0.0)

    def tiny(self, tokenizer: Any, hidden: int = HIDDEN) -> tuple[type, Any, Any]:
        """See Family. Two linear layers and a full one; its head is not tied to its embedding."""
        from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

        config = Qwen3_5Config(
            text_config=tiny_text(tokenizer, hidden, **tiny_linear(), tie_word_embeddings=False),
            vision_config=tiny_vision(hidden),
            tie_word_embeddings=False,
            **tiny_ids(tokenizer),
        )
        return Qwen3_5ForConditionalGeneration, config, tiny_qwen3_processor(tokenizer)


@torch.compiler.disable
def gated_delta_net(self: Any, hidden_states: torch.Tensor, attention_mask: Any, **_: Any) -> torch.Tensor:
    """transformers' Qwen3_5GatedDeltaNet.forward for packed rows.

    Args:
        hidden_states: [B, L, D].
        attention_mask: the batch's `rethinker.policy.recurrent.Sequences`.

    Returns:
        [B, L, D].
    """
    x = attention_mask.row(hidden_states)  # [T, D]
    convolution, rule = self.kernels(x.is_cuda)
    mixed = attention_mask.convolve(
        self.in_proj_qkv(x), partial(self.conv1d, convolution=convolution, activation=self.activation)
    )
    q, k, v = mixed.split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
    q, k = (part.unflatten(-1, (-1, self.head_k_dim)) for part in (q, k))
    if (groups := self.num_v_heads // self.num_k_heads) > 1:
        q, k = (part.repeat_interleave(groups, dim=1) for part in (q, k))
    decay = -self.A_log.float().exp() * F.softplus(self.in_proj_a(x).float() + self.dt_bias)
    out = attention_mask.recur(
        partial(rule, use_qk_l2norm_in_kernel=True),
        *(q, k, v.unflatten(-1, (-1, self.head_v_dim))),
        g=decay,
        beta=self.in_proj_b(x).sigmoid(),
    )
    out = self.norm(out, self.in_proj_z(x).view_as(out))
    return attention_mask.rows(self.out_proj(out.flatten(1)))


def _convolve(self: torch.nn.Conv1d, x: torch.Tensor, convolution: Any, activation: str) -> torch.Tensor:
    """The layer's causal convolution of x [1, C, X], to the same shape."""
    return convolution(x, self.weight.squeeze(1), self.bias, activation=activation)


def library(on_gpu: bool) -> tuple[Any, Any]:
    """The convolution and the rule: on GPUs those that transformers chooses, of causal-conv1d and
    flash-linear-attention where these are installed; else PyTorch's, which ignore the bounds of sequences."""
    from transformers.models.qwen3_5.modeling_qwen3_5 import causal_conv1d_fn, torch_chunk_gated_delta_rule

    chosen = causal_conv1d_fn, torch_chunk_gated_delta_rule
    return chosen if on_gpu else tuple(map(unwrap, chosen))


def tiny_linear() -> dict[str, Any]:
    """What the text_config of a tiny Qwen3.5 has besides a Qwen3-VL's."""
    return {
        "head_dim": 32,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        # Half of a head turns: of the 16 frequencies of a whole one 8.
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
    }


FAMILY = Qwen3_5()
