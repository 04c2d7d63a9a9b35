"""Laws of precision: softmax statistics from fp32 logits, and gradients that the loss's own gradient scales in fp32."""

from __future__ import annotations

import pytest
import torch

from benchmarks import reference
from rethinker_kernels import linear_grpo_loss, linear_selective_log_softmax

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def exact(hidden, weight, index, temperature):
    """Log-probs and entropies in fp64, of a part of the vocabulary at a time: no fp64 copy of the weight."""
    logits = torch.cat([hidden.double() @ part.double().T for part in weight.split(8192)], dim=1)
    return reference.selective_log_softmax(logits, index, temperature=temperature, return_entropy=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("rows", "width", "vocabulary"),
    [
        pytest.param(1937, 3584, 152_064, marks=pytest.mark.soak),
        (2169, 896, 151_936),
        (1530, 2048, 32_256),
        pytest.param(1388, 4096, 102_400, marks=pytest.mark.soak),
    ],
)
def test_log_probs_of_16_bit_inputs(device, rows, width, vocabulary):
    """verl's four shapes, values, temperature and tolerances (tests/utils/test_linear_cross_entropy.py), against fp64;
    a CPU takes fewer rows. Logits rounded to bf16 fail it on any of them."""
    g = torch.Generator(device).manual_seed(0)
    rows = rows if device == "cuda" else 5

    def uniform(*size):
        return torch.empty(*size, dtype=torch.bfloat16, device=device).uniform_(-0.5, 0.5, generator=g)

    hidden, weight = uniform(rows, width), uniform(vocabulary, width)
    index = torch.randint(vocabulary, (rows,), device=device, generator=g)
    logps, entropy = linear_selective_log_softmax(hidden, weight, index, temperature=1.5, return_entropy=True)
    zeros = torch.zeros(rows, device=device)
    _, in_loss, stats = linear_grpo_loss(
        hidden.requires_grad_(), weight, index, zeros, zeros, temperature=1.5, normalizer=1.0
    )
    want_logps, want_entropy = exact(hidden.detach(), weight, index, 1.5)
    for got in (logps, in_loss):
        torch.testing.assert_close(got.double(), want_logps, atol=1e-3, rtol=2e-4)
    torch.testing.assert_close(entropy.double(), want_entropy, atol=5e-3, rtol=5e-4)
    torch.testing.assert_close(stats[-1], want_entropy.sum(), atol=5e-3 * rows, rtol=5e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_log_ratios_are_larger_than_their_error(device, dtype):
    """After a weight change that moves log-probs by 0.003 on average, the ratio's mean error is below 10% of that."""
    torch.manual_seed(0)
    rows, width, vocabulary = 64, 256, 4096
    hidden = torch.randn(rows, width).to(dtype).to(device)
    weight = (5 * torch.randn(vocabulary, width) / width**0.5).to(dtype).to(device)
    changed = weight.clone()
    changed[:, :2] += (5e-3 * torch.randn(vocabulary, 2)).to(dtype).to(device)
    index = torch.distributions.Categorical(logits=(hidden @ weight.T).float().cpu()).sample().to(device)
    got = linear_selective_log_softmax(hidden, changed, index) - linear_selective_log_softmax(hidden, weight, index)
    want = exact(hidden, changed, index, 1.0)[0] - exact(hidden, weight, index, 1.0)[0]
    assert 0.002 < want.abs().mean() < 0.004, want.abs().mean()
    assert (got.double() - want).abs().mean() < 0.1 * want.abs().mean()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_the_upstream_gradient_scales_exactly(device, dtype, importance):
    """A third of the loss has a third of its gradients: to 1e-6 in fp32; in 16 bits the fp32 sums of weight and bias
    are scaled before they are rounded, so rounding happens once."""
    torch.manual_seed(0)
    rows, width, vocabulary = 40, 24, 300
    sizes = ((rows, width), (vocabulary, width), (vocabulary,))
    hidden, weight, bias = ((torch.randn(*s) / 2).to(dtype).to(device).requires_grad_() for s in sizes)
    index = torch.randint(vocabulary, (rows,), device=device)
    per_row = {"old_logps": torch.full((rows,), -6.0, device=device), "advantages": torch.randn(rows, device=device)}
    sequences = torch.tensor([0, 15, rows], device=device)
    loss, *_ = linear_grpo_loss(
        hidden, weight, index, **per_row, bias=bias, cu_seqlens=sequences, importance=importance, normalizer=rows
    )
    sums = [g.clone() for g in loss.grad_fn.saved_tensors]
    assert sums[1].dtype == sums[2].dtype == torch.float32
    third = torch.tensor(1 / 3, device=device)
    for got, total in zip(torch.autograd.grad(loss * third, (hidden, weight, bias)), sums, strict=True):
        assert got.dtype == dtype and got.norm() > 0
        assert torch.equal(got, (total.float() * third).to(dtype))
        if dtype == torch.float32:
            assert (got.double() - total.double() / 3).norm() <= 1e-6 * total.norm()
