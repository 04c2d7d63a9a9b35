"""Layers of fp32 models that a CPU trains faster than with torch's own: linear ones, and RMSNorm.

torch multiplies fp32 matrices with MKL, which on AMD leaves AVX-512 unused. Measured on an AMD EPYC core, 13,300 rows
of 128 to 384: MKL 86 GFLOP/s, oneDNN 190. transformers' RMSNorm is several operations, each with a backward of its own:
both ways 5,129 rows of 128 take 7.6 ms on an Intel Xeon core, and 3.4 with the gradient's formula.
"""

from __future__ import annotations

import os

import torch
from torch import nn
from torch.autograd.function import once_differentiable

# oneDNN, and torch's layer around it, keep the compiled products of the last 1,024 shapes. Rows differ in length from
# step to step, so few come again: memory would grow by hundreds of megabytes over the first 300 steps.
KEPT_SHAPES = {"LRU_CACHE_CAPACITY": "128", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"}


def use_cpu_layers(model: nn.Module, device: str = "cpu") -> None:
    """Replace the classes of a model's fp32 layers: of every plain `nn.Linear` by `OneDNNLinear`, if this torch has
    oneDNN, and of transformers' RMSNorms by `RMSNorm`.

    Parameters, names and the values (to fp32 rounding) stay as they were.

    Args:
        device: where the weights are; others are left alone. "meta" for what is counted and never computed.
    """
    onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if onednn:
        for name, value in KEPT_SHAPES.items():
            os.environ.setdefault(name, value)  # read at the first product
    for module in model.modules():
        # Under ZeRO-3 the weight is partitioned by now; its type and device are still known.
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or (weight.device.type, weight.dtype) != (device, torch.float32):
            continue
        if type(module) is nn.Linear and onednn:
            module.__class__ = OneDNNLinear
        elif hasattr(module, "variance_epsilon") and type(module).__name__.endswith("RMSNorm"):
            module.__class__ = RMSNorm


class OneDNNLinear(nn.Linear):
    """`nn.Linear` whose products with the weight (the output, and the input's gradient) are oneDNN's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] -> [..., out_features]."""
        if not x.numel() or x.device.type != "cpu":  # oneDNN fails on empty products; the model may have moved since
            return super().forward(x)
        return _Linear.apply(x, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    """Saves the parameter, not a view of its data: under ZeRO-3 that data is gathered again for the backward."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _times_transposed(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            _times_transposed(grad, weight.T.contiguous()) if needs_x else None,
            # By torch, without the copies that oneDNN needs: 12 ms instead of 21 (an Intel Xeon core, shapes as above).
            rows.T @ x.flatten(0, -2) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )


def _times_transposed(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """a @ b.T + bias."""
    if torch.compiler.is_compiling():
        return _opaque_product(a, b, bias)
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


@torch.library.custom_op("rethinker::times_transposed", mutates_args=())
def _opaque_product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The same as one operation for policy.compile: inductor knows oneDNN's only with weights packed for inference."""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


@_opaque_product.register_fake
def _(a, b, bias):
    return a.new_empty((*a.shape[:-1], b.shape[0]))


class RMSNorm(nn.Module):
    """A family's RMSNorm with the gradient's own formula. It is only ever the class of a module that was made as
    another, and has that one's `weight` [D] and `variance_epsilon`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., D] over the root of its mean square, times the weight."""
        # Other types, of a model that was converted since, need sums in fp32; inductor fuses torch's own.
        if x.dtype != torch.float32 or torch.compiler.is_compiling():
            return nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)
        return _RMSNorm.apply(x, self.weight, self.variance_epsilon)


class _RMSNorm(torch.autograd.Function):
    """With n = x / rms(x) and h the gradient of n, that of x is (h - n mean(h n)) / rms(x)."""

    @staticmethod
    def forward(ctx, x, weight, epsilon):
        scale = x.square().mean(dim=-1, keepdim=True).add_(epsilon).rsqrt_()
        normal = x * scale
        ctx.save_for_backward(normal, scale, weight)
        return normal * weight

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        normal, scale, weight = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        product = grad * normal
        along = (product @ weight)[..., None].div_(weight.numel())
        return (
            (grad * weight).addcmul_(normal, along, value=-1).mul_(scale) if needs_x else None,
            product.reshape(-1, weight.numel()).sum(0) if needs_weight else None,
            None,
        )
