"""Liger's fused layers in one model instance (policy.fused_layers): RMSNorm, SwiGLU and rotary embedding, the forward
and the backward of each in one Triton kernel.

Liger's own `apply_liger_kernel_to_*(model=...)` also replaces classes and functions in transformers' modules, so every
model built later in the process would change with it (a rollout's, for one); and what it replaces for Qwen2-VL and
Qwen2.5-VL, `apply_multimodal_rotary_pos_emb`, is not called by transformers 5. Here only the instance's forwards
change; parameters, names and classes stay, so ZeRO-3 may have partitioned the weights already.
"""

from __future__ import annotations

from types import FunctionType, MethodType

import torch
from torch import nn
from transformers.activations import SiLUActivation

ROTARY = "apply_rotary_pos_emb"  # the function that attention layers of transformers' language models call


def use_liger(model: nn.Module) -> None:
    """Let a model's RMSNorms, SwiGLUs and the attention layers of its language model run Liger's kernels.

    Args:
        model: of a supported family. Its norms are `weight * x / rms(x)` with the mean square in fp32, which Liger
            calls the llama mode.
    """
    from liger_kernel.transformers import LigerRMSNorm, LigerSwiGLUMLP

    for module in model.modules():
        forward = type(module).forward
        if type(module).__name__.endswith("RMSNorm"):
            # In place: the input's gradient overwrites the output's, which only this norm's backward reads.
            module.offset, module.casting_mode, module.in_place, module.row_mode = 0.0, "llama", True, None
            module.forward = MethodType(LigerRMSNorm.forward, module)
        elif hasattr(module, "gate_proj") and isinstance(getattr(module, "act_fn", None), nn.SiLU | SiLUActivation):
            module.forward = MethodType(LigerSwiGLUMLP.forward, module)
        elif isinstance(forward, FunctionType) and ROTARY in forward.__code__.co_names:
            module.forward = MethodType(_with_ligers_rotary(forward), module)


def _with_ligers_rotary(forward: FunctionType) -> FunctionType:
    """transformers' own forward of an attention layer, but in it the name `apply_rotary_pos_emb` is Liger's."""
    changed = FunctionType(
        forward.__code__,
        forward.__globals__ | {ROTARY: _rotary},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    changed.__kwdefaults__ = forward.__kwdefaults__
    return changed


def _rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, heads, L, head_dim] and k rotated by cos and sin [B, L, head_dim].

    M-RoPE too: which of the three positions turns which channel is settled in that table, once for all layers.
    """
    from liger_kernel.ops import LigerRopeFunction

    return LigerRopeFunction.apply(q, k, cos, sin)
