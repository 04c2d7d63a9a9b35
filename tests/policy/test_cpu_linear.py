"""oneDNN's linear layers are torch's, to fp32 rounding."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rethinker.policy.cpu_linear import OneDNNLinear, use_onednn


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 24), (2, 65, 24), (1, 24), (0, 24), (3, 0, 24)])
def test_values_and_gradients_equal_torchs(shape, bias):
    """Output and the gradients of input, weight and bias within 1e-6, for any number of rows, none included."""
    plain = nn.Sequential(nn.Linear(24, 40, bias=bias), nn.GELU(), nn.Linear(40, 8, bias=bias))
    ours = copy.deepcopy(plain)
    use_onednn(ours)
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
    use_onednn(nn.Sequential(layer))
    x = torch.randn(6, 9).requires_grad_()
    y = torch.randn(6, 9)
    y.data.copy_(x.data)
    y.requires_grad_()
    layer(x.T).square().sum().backward()
    expected(y.T).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-6)
    assert layer.weight.grad is None


def test_other_types_are_left_alone():
    """Subclasses, other dtypes and other modules keep their own forward."""
    model = nn.ModuleList(
        [nn.Linear(4, 4).double(), nn.LayerNorm(4), nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4)]
    )
    kinds = [type(module) for module in model]
    use_onednn(model)
    assert [type(module) for module in model] == kinds


def test_elsewhere_than_on_a_cpu_torch_multiplies(monkeypatch):
    """A model that has moved since: the meta device stands for a GPU, where oneDNN is not."""
    model = nn.Sequential(nn.Linear(6, 5))
    use_onednn(model)
    monkeypatch.delattr("rethinker.policy.cpu_linear._times_transposed")
    assert model.to("meta")(torch.empty(3, 6, device="meta")).shape == (3, 5)
