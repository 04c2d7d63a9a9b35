"""torch.compile takes every differentiable op whole, without graph breaks, and gives the eager result.

A linear loss is composed of the others then, and makes four products."""

from __future__ import annotations

import pytest
import torch

from rethinker_kernels import grpo_loss, linear_grpo_loss, linear_selective_log_softmax, selective_log_softmax

ROWS, WIDTH, VOCABULARY = 12, 8, 40


def cases(device: str) -> dict[str, tuple]:
    """Per op: a loss of it, and what it is differentiated in; with options that are None by default, and without."""
    torch.manual_seed(0)
    hidden, weight, bias, logits, logps = (
        torch.randn(*size, device=device, requires_grad=True)
        for size in ((ROWS, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,), (ROWS, VOCABULARY), (ROWS,))
    )
    index = torch.randint(VOCABULARY, (ROWS,), device=device)
    old, advantages, weights = -3 * torch.rand(ROWS), torch.randn(ROWS), torch.rand(ROWS) + 0.5
    old, advantages, weights = (x.to(device) for x in (old, advantages, weights))
    sequences = torch.tensor([0, 5, ROWS], device=device)
    plain = {"normalizer": 3.0}
    full = {
        "cu_seqlens": sequences, "ref_logps": old, "kl_coef": 0.1, "dual_clip": 3.0, "clip_high": 0.28,
        "aggregation": "sequence", "importance": "sequence", "weights": weights, "mask": old < -0.1,
        "normalizer": torch.tensor(3.0, device=device),
    }  # fmt: skip

    def both(outputs):
        return outputs[0].sum() + 0.3 * outputs[1].sum()

    def log_softmax(x):
        return both(selective_log_softmax(x, index, temperature=0.8, return_entropy=True))

    def linear(h, w, b):
        return both(linear_selective_log_softmax(h, w, index, bias=b, temperature=0.8, return_entropy=True))

    def capped(h, w, b):
        return both(linear_selective_log_softmax(h, w, index, bias=b, softcap=2.0, return_entropy=True))

    return {
        "selective_log_softmax": (log_softmax, (logits,)),
        "linear_selective_log_softmax": (linear, (hidden, weight, bias)),
        "selective_log_softmax, soft cap": (lambda x: selective_log_softmax(x, index, softcap=2.0).sum(), (logits,)),
        "linear_selective_log_softmax, soft cap": (capped, (hidden, weight, bias)),
        "grpo_loss": (lambda x: grpo_loss(x, old, advantages, **plain)[0], (logps,)),
        "grpo_loss, all options": (lambda x: grpo_loss(x, old, advantages, **full)[0], (logps,)),
        "linear_grpo_loss": (lambda h, w: linear_grpo_loss(h, w, index, old, advantages, **plain)[0], (hidden, weight)),
        "linear_grpo_loss, all options": (
            lambda h, w, b: linear_grpo_loss(h, w, index, old, advantages, bias=b, nll_weights=weights, **full)[0],
            (hidden, weight, bias),
        ),
        "linear_grpo_loss, entropy bonus": (
            lambda h, w: linear_grpo_loss(h, w, index, old, advantages, entropy_coef=0.1, **plain)[0],
            (hidden, weight),
        ),
        "linear_grpo_loss, soft cap": (
            lambda h, w: linear_grpo_loss(h, w, index, old, advantages, softcap=2.0, **plain)[0],
            (hidden, weight),
        ),
    }


@pytest.mark.parametrize("name", cases("cpu"))
@pytest.mark.parametrize(
    ("device", "backend"), [("cpu", "aot_eager"), pytest.param("cuda", "inductor", marks=pytest.mark.gpu)]
)
def test_compiled_is_eager(name, device, backend):
    """Loss and gradients, in one graph."""
    loss, leaves = cases(device)[name]
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    results = []
    for function in (loss, compiled):
        value = function(*leaves)
        results.append((value.detach(), *torch.autograd.grad(value, leaves)))
    torch.testing.assert_close(*results)


@pytest.mark.gpu
def test_compiled_in_16_bits_is_eager():
    """bf16 too, bit for bit: on a Hopper GPU that is another kernel."""
    generator = torch.Generator("cuda").manual_seed(0)
    hidden, weight = (torch.randn(n, 64, device="cuda", generator=generator).bfloat16() for n in (200, 10_000))
    index = torch.randint(10_000, (200,), device="cuda", generator=generator)

    def loss(h, w):
        return linear_selective_log_softmax(h, w, index).sum()

    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    want = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
