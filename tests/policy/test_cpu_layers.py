"""Layers on a CPU are torch's and transformers', to fp32 rounding."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.models.internvl.modeling_internvl import InternVLVisionRMSNorm
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm

from rethinker.policy.cpu_layers import OneDNNLinear, RMSNorm, _RMSNorm, use_cpu_layers


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 24), (2, 65, 24), (1, 24), (0, 24), (3, 0, 24)])
def test_values_and_gradients_equal_torchs(shape, bias):
    """Output and the gradients of input, weight and bias within 1e-6, for any number of rows, none included."""
    plain = nn.Sequential(nn.Linear(24, 40, bias=bias), nn.GELU(), nn.Linear(40, 8, bias=bias))
    ours = copy.deepcopy(plain)
    use_cpu_layers(ours)
    assert type(ours[0]) is type(ours[2]) is OneDNNLinear
    inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2)]
    results = [model(x) for model, x in zip((plain, ours), inputs, strict=True)]
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    for result in results:
        (result.sin() * 3).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-5)


def test_non_contiguous_inputs_and_frozen_weights():
    """A transposed input is read right, and a frozen layer passes gradients through without keeping its own."""
    layer = nn.Linear(6, 5).requires_grad_(False)
    expected = copy.deepcopy(layer)
    use_cpu_layers(nn.Sequential(layer))
    x = torch.randn(6, 9).requires_grad_()
    y = torch.randn(6, 9)
    y.data.copy_(x.data)
    y.requires_grad_()
    layer(x.T).square().sum().backward()
    expected(y.T).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-6)
    assert layer.weight.grad is None


@pytest.mark.parametrize("norm", [Qwen2_5_VLRMSNorm, Qwen3VLTextRMSNorm, InternVLVisionRMSNorm])
@pytest.mark.parametrize("shape", [(7, 24), (2, 65, 24), (1, 3, 5, 24), (24,), (0, 24)])
def test_rms_norm_is_transformers(shape, norm):
    """Output and both gradients, on rows of usual size, of next to nothing, and of zeros."""
    plain = norm(24, eps=1e-6)
    plain.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    ours = copy.deepcopy(plain)
    use_cpu_layers(ours)
    assert type(ours) is RMSNorm
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if x.ndim > 1 and len(x) > 1:
        x[0] *= 1e-4
        x[1] = 0
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    results = [model(x) for model, x in zip((plain, ours), inputs, strict=True)]
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    for result in results:
        (result.sin() * 3).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad, rtol=1e-5, atol=1e-5)


def test_rms_norms_gradient_is_that_of_its_values():
    """By finite differences, in fp64, whichever of the two is trained."""
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    weight = torch.randn(8, dtype=torch.float64)
    for of in ((True, True), (True, False), (False, True)):
        given = [part.clone().requires_grad_(needs) for part, needs in zip((x, weight), of, strict=True)]
        assert torch.autograd.gradcheck(lambda x, weight: _RMSNorm.apply(x, weight, 1e-3), given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_that_is_converted_later_is_normalized_in_fp32(dtype):
    """As transformers' own, also where squares exceed the type's range."""
    plain = Qwen2_5_VLRMSNorm(128)
    ours = copy.deepcopy(plain)
    use_cpu_layers(ours)
    x = torch.full((3, 128), 300, dtype=dtype)
    torch.testing.assert_close(ours.to(dtype)(x), plain.to(dtype)(x))


def test_every_norm_of_a_model_is_replaced(model):
    """What its language model and its vision tower are normalized by is this file's, and nothing else has become it."""
    before = {path: type(module).__name__ for path, module in model.named_modules()}
    use_cpu_layers(model)
    norms = {path for path, module in model.named_modules() if type(module) is RMSNorm}
    assert norms == {path for path, kind in before.items() if kind.endswith("RMSNorm")} != set()


def test_other_types_are_left_alone():
    """Subclasses, other dtypes and other modules keep their own forward."""
    model = nn.ModuleList(
        [
            nn.Linear(4, 4).double(),
            nn.LayerNorm(4),
            nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4),
            nn.RMSNorm(4),
            Qwen2_5_VLRMSNorm(4).bfloat16(),
        ]
    )
    kinds = [type(module) for module in model]
    use_cpu_layers(model)
    assert [type(module) for module in model] == kinds


def test_elsewhere_than_on_a_cpu_torch_multiplies(monkeypatch):
    """A model that has moved since: the meta device stands for a GPU, where oneDNN is not."""
    model = nn.Sequential(nn.Linear(6, 5))
    use_cpu_layers(model)
    monkeypatch.delattr("rethinker.policy.cpu_layers._times_transposed")
    assert model.to("meta")(torch.empty(3, 6, device="meta")).shape == (3, 5)
