"""selective_log_softmax and linear_selective_log_softmax against plain PyTorch, autograd and float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from rethinker_kernels import linear, linear_selective_log_softmax, selective_log_softmax

INF = math.inf


def naive(
    logits: torch.Tensor, index: torch.Tensor, temperature: float = 1.0, softcap: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob and entropy from probabilities, in float64."""
    logits = logits.double()
    if softcap is not None:
        up, down = (logits / softcap).exp(), (-logits / softcap).exp()
        logits = softcap * (up - down) / (up + down)
    p = torch.softmax(logits / temperature, -1)
    logps = p.gather(-1, index.unsqueeze(-1)).squeeze(-1).log()
    return logps, torch.special.entr(p).sum(-1)


@pytest.fixture
def small_chunks(monkeypatch):
    """Logits of 2 rows and products of 3 at a time: a few rows already cross both borders."""
    monkeypatch.setattr(linear, "chunk_rows", lambda *_: (2, 3))


@pytest.mark.parametrize("vocabulary", [1, 2, 127, 129, 1000])
@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (2, 5)])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
@pytest.mark.parametrize("softcap", [None, 4.0, 30.0])
def test_equals_the_naive_formula(vocabulary, shape, temperature, softcap):
    """Values are log-softmax and entropy of the tempered logits, capped or not, for any leading shape, rows of zero
    included."""
    torch.manual_seed(0)
    logits = 5 * torch.randn(*shape, vocabulary)
    index = torch.randint(vocabulary, shape)
    head = {"temperature": temperature, "softcap": softcap}
    logps, entropy = selective_log_softmax(logits, index, **head, return_entropy=True)
    expected_logps, expected_entropy = naive(logits, index, temperature, softcap)
    assert logps.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logps.double(), expected_logps, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(entropy.double(), expected_entropy, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(selective_log_softmax(logits, index, **head), logps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_low_precision_logits_are_computed_in_fp32(dtype, softcap):
    """bf16 and fp16 logits give fp32 results as exact as those numbers in float64, and gradients of their own type."""
    torch.manual_seed(0)
    logits = (5 * torch.randn(6, 300)).to(dtype).requires_grad_()
    index = torch.randint(300, (6,))
    logps = selective_log_softmax(logits, index, softcap=softcap)
    torch.testing.assert_close(logps.double(), naive(logits, index, 1.0, softcap)[0], atol=2e-5, rtol=0)
    logps.sum().backward()
    assert logits.grad.dtype == dtype


def test_strided_rows():
    """Logits whose rows or columns are not contiguous give the same as their copy."""
    base = torch.randn(4, 10, 6)
    index = torch.randint(6, (4, 5))
    torch.testing.assert_close(
        selective_log_softmax(base[:, ::2], index), selective_log_softmax(base[:, ::2].clone(), index)
    )
    turned = torch.randn(6, 8).T
    index = torch.randint(6, (8,))
    torch.testing.assert_close(selective_log_softmax(turned, index), naive(turned, index)[0].float())


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("softcap", [None, 0.9])
def test_gradcheck_of_both_outputs(temperature, softcap):
    """Autograd's gradient of log-prob and entropy equals finite differences."""
    torch.manual_seed(0)
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([0, 4, 2, 2])
    options = {"temperature": temperature, "return_entropy": True, "softcap": softcap}
    assert gradcheck(lambda x: selective_log_softmax(x, index, **options), (logits,))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("softcap", [None, 0.9])
def test_linear_gradcheck(small_chunks, bias, entropy, softcap):
    """The chunked backward's gradients of hidden, weight and bias equal finite differences across chunk borders."""
    torch.manual_seed(0)
    inputs = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((7, 3), (5, 3), (5,))[: 2 + bias]]
    index = torch.randint(5, (7,))

    def op(hidden, weight, *rest):
        options = {"temperature": 0.8, "return_entropy": entropy, "softcap": softcap}
        return linear_selective_log_softmax(hidden, weight, index, bias=rest[0] if rest else None, **options)

    assert gradcheck(op, inputs)


def test_linear_equals_the_two_lines_it_replaces(small_chunks):
    """Values and gradients are those of selective_log_softmax(hidden @ weight.T), also when only one output is used."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(8, 6, requires_grad=True), torch.randn(11, 6, requires_grad=True)
    index = torch.randint(11, (8,))
    for pick in (0, 1):
        got = linear_selective_log_softmax(hidden, weight, index, temperature=0.7, return_entropy=True)[pick]
        want = selective_log_softmax(hidden @ weight.T, index, temperature=0.7, return_entropy=True)[pick]
        torch.testing.assert_close(got, want)
        factor = torch.randn(8)
        for a, b in zip(
            torch.autograd.grad((got * factor).sum(), (hidden, weight)),
            torch.autograd.grad((want * factor).sum(), (hidden, weight)),
            strict=True,
        ):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_linear_skips_the_gradient_of_a_frozen_input():
    """A frozen weight gets no gradient, and the hidden states still do; and the other way round."""
    for frozen in (0, 1):
        inputs = [torch.randn(4, 3), torch.randn(5, 3)]
        inputs[1 - frozen].requires_grad_()
        linear_selective_log_softmax(*inputs, torch.tensor([0, 1, 2, 3])).sum().backward()
        assert inputs[frozen].grad is None and inputs[1 - frozen].grad.abs().sum() > 0


def test_linear_never_holds_all_logits(monkeypatch):
    """No tensor of [R, V] size is alive at once: the largest allocation is one chunk's logits."""
    rows, width, vocabulary = 512, 4, 64
    chunk = 64 * vocabulary * 4
    monkeypatch.setattr(linear, "chunk_rows", lambda *_: (64, 64))
    hidden, weight = torch.randn(rows, width, requires_grad=True), torch.randn(vocabulary, width, requires_grad=True)
    index = torch.randint(vocabulary, (rows,))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        linear_selective_log_softmax(hidden, weight, index, return_entropy=True)[0].sum().backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest <= chunk < 4 * rows * vocabulary


def test_no_rows():
    """An empty batch gives empty outputs that can be differentiated."""
    hidden, weight = torch.randn(0, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    logps, entropy = linear_selective_log_softmax(
        hidden, weight, torch.empty(0, dtype=torch.int64), return_entropy=True
    )
    assert logps.shape == entropy.shape == (0,)
    (logps.sum() + entropy.sum()).backward()
    assert weight.grad.eq(0).all() and hidden.grad.shape == (0, 3)


def test_banned_tokens_are_legal():
    """-inf logits give no NaN, in log-prob, entropy or gradient; a banned token has log-prob -inf."""
    logits = torch.tensor([[1.0, -INF, 2.0, 0.5], [0.3, -INF, -INF, -INF]], dtype=torch.float64, requires_grad=True)
    index = torch.tensor([2, 0])
    logps, entropy = selective_log_softmax(logits, index, return_entropy=True)
    expected = naive(logits.detach()[:, [0, 2, 3]], torch.tensor([1, 0]))
    torch.testing.assert_close(logps, expected[0])
    torch.testing.assert_close(entropy, expected[1])
    (logps + 0.5 * entropy).sum().backward()
    assert logits.grad.isfinite().all() and logits.grad[:, 1].eq(0).all()
    assert selective_log_softmax(logits, torch.tensor([1, 1])).eq(-INF).all()


def test_a_cap_lifts_a_ban():
    """Under a cap -inf is the logit -softcap, as PyTorch's tanh has it, and has no gradient; logits of +-1e4 are at
    either cap."""
    logits = torch.tensor([[1.0, -INF, 1e4, -1e4]], requires_grad=True)
    logps, entropy = selective_log_softmax(logits, torch.tensor([1]), return_entropy=True, softcap=2.0)
    expected = naive(torch.tensor([[2 * math.tanh(0.5), -2.0, 2.0, -2.0]]), torch.tensor([1]))
    torch.testing.assert_close((logps.double(), entropy.double()), expected, atol=1e-6, rtol=0)
    (logps + entropy).sum().backward()
    assert logits.grad.ne(0).tolist() == [[True, False, False, False]]


def test_large_logits():
    """Logits of +-1e4 neither overflow nor lose the difference between them."""
    logits = torch.tensor([[1e4, 1e4 - 1, -1e4]])
    logps, entropy = selective_log_softmax(logits, torch.tensor([1]), return_entropy=True)
    torch.testing.assert_close(logps, torch.tensor([-1 - math.log1p(math.exp(-1))]), atol=1e-3, rtol=0)
    assert entropy.isfinite().all()


@pytest.mark.parametrize("bad", [-1, 5, -100, 2**40])
def test_index_out_of_range_poisons_its_row_only(bad):
    """Such a row becomes NaN in both outputs and has no gradient; its neighbours are untouched."""
    logits = torch.randn(3, 5, requires_grad=True)
    index = torch.tensor([1, bad, 2])
    logps, entropy = selective_log_softmax(logits, index, return_entropy=True)
    assert logps.isnan().tolist() == entropy.isnan().tolist() == [False, True, False]
    (logps[[0, 2]].sum() + entropy[[0, 2]].sum()).backward()
    assert logits.grad[1].eq(0).all() and logits.grad[0].ne(0).all()


def test_temperature_zero_is_the_greedy_limit():
    """T = 0 puts all mass on the largest logits, ties shared, with zero gradient; very small T agrees with it."""
    logits = torch.tensor([[1.0, 3.0, 2.0], [3.0, 3.0, -INF]], requires_grad=True)
    index = torch.tensor([1, 0])
    for temperature in (0.0, 1e-30):
        logps, entropy = selective_log_softmax(logits, index, temperature=temperature, return_entropy=True)
        torch.testing.assert_close(logps, torch.tensor([0.0, -math.log(2)]))
        torch.testing.assert_close(entropy, torch.tensor([0.0, math.log(2)]))
    logps, entropy = selective_log_softmax(logits, index, temperature=0.0, return_entropy=True)
    (gradient,) = torch.autograd.grad(logps.sum() + entropy.sum(), logits)
    assert gradient.eq(0).all()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("logits", {"logits": torch.zeros(3, 4, dtype=torch.int64)}),
        ("logits", {"logits": torch.zeros(3, 0)}),
        ("index", {"index": torch.zeros(2, dtype=torch.int64)}),
        ("index", {"index": torch.zeros(3, dtype=torch.int32)}),
        ("index", {"index": torch.zeros(3, dtype=torch.int64, device="meta")}),
        ("temperature", {"temperature": -0.1}),
        ("temperature", {"temperature": math.nan}),
        ("temperature", {"temperature": torch.ones(3)}),
        ("softcap", {"softcap": 0.0}),
        ("softcap", {"softcap": -30.0}),
        ("softcap", {"softcap": math.nan}),
        ("softcap", {"softcap": INF}),
        ("softcap", {"softcap": torch.ones(3)}),
    ],
)
def test_wrong_arguments_are_named(name, changes):
    """A shape, type or device that does not fit raises ValueError whose message starts with the argument's name."""
    arguments = {"logits": torch.zeros(3, 4), "index": torch.zeros(3, dtype=torch.int64)} | changes
    with pytest.raises(ValueError, match=f"^{name}"):
        selective_log_softmax(**arguments)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("hidden", {"hidden": torch.zeros(3, 4, 1)}),
        ("weight", {"weight": torch.zeros(5, 3)}),
        ("weight", {"weight": torch.zeros(5, 4, dtype=torch.bfloat16)}),
        ("weight", {"weight": torch.zeros(5, 4, device="meta")}),
        ("bias", {"bias": torch.zeros(4)}),
        ("index", {"index": torch.zeros(4, dtype=torch.int64)}),
        ("softcap", {"softcap": 0.0}),
    ],
)
def test_wrong_linear_arguments_are_named(name, changes):
    """The same for the linear op."""
    arguments = {
        "hidden": torch.zeros(3, 4),
        "weight": torch.zeros(5, 4),
        "index": torch.zeros(3, dtype=torch.int64),
    } | changes
    with pytest.raises(ValueError, match=f"^{name}"):
        linear_selective_log_softmax(**arguments)


@pytest.mark.parametrize("softcap", [0, -1.0, math.inf, math.nan, 1e-40, 1e300, "30", [1.0], 1j, torch.tensor(3.0)])
def test_a_soft_cap_that_cannot_be(softcap):
    """It is named, whatever it is."""
    with pytest.raises(ValueError, match=r"^softcap=.*: must be one number above 0, or None"):
        selective_log_softmax(torch.randn(2, 5), torch.tensor([0, 1]), softcap=softcap)
