"""The Triton kernels, in the interpreter or on a GPU, against the fp64 definition over awkward shapes and values.

Not collected by itself: TRITON_INTERPRET must be set before triton is imported, so test_triton.py runs this file in a
process of its own, as well as copies of the kernels with a fault planted. On a GPU test_gpu.py runs it as it is.
"""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
import triton
import triton.language as tl

import rethinker_kernels
from benchmarks import reference
from rethinker_kernels import linear, linear_grpo_loss, linear_policy_loss, losses, selective_log_softmax
from rethinker_kernels.devices import processors, takes_triton
from rethinker_kernels.losses import Surrogate, grpo
from rethinker_kernels.triton_kernels.linear_loss import grpo_rows
from rethinker_kernels.triton_kernels.log_softmax import FEW, load_logits

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIXTEEN_BITS = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # the interpreter rounds to bf16 wrongly
INF = math.inf
VOCABULARIES = [1, 2, 127, 128, 129, 1000, 4099]
KINDS = ["random", "near uniform", "huge", "banned", "float min"]


@pytest.fixture(autouse=True)
def seeded():
    """As tests/conftest.py seeds a test, which is not read in the interpreter."""
    torch.manual_seed(0)


def test_draws_depend_on_the_test_alone():
    """And not on the tests before it, so that a failed one fails again by its name."""
    assert torch.equal(torch.rand(9), torch.rand(9, generator=torch.Generator().manual_seed(0)))


def test_these_are_the_triton_kernels():
    """Otherwise everything below would compare PyTorch with itself."""
    assert takes_triton(torch.zeros(1, device=DEVICE))


def logits_of(kind: str, rows: int, vocabulary: int) -> torch.Tensor:
    """Rows that overflow, or that a padding column would outweigh, or with most tokens banned."""
    generator = torch.Generator().manual_seed(rows * 7919 + vocabulary)
    x = torch.randn(rows, vocabulary, generator=generator)
    if kind == "near uniform":
        x = 1e-3 * x - 5.0  # a column of 0 beyond V would weigh exp(5)
    elif kind == "huge":
        x = 1e4 * (2 * (x > 0) - 1.0) + x.round(decimals=1)
    elif kind == "banned":
        x = torch.where(torch.rand(x.shape, generator=generator) < 0.7, -INF, 4 * x)
        x[:, vocabulary // 2] = 1.0
    elif kind == "float min":
        x = torch.where(x > 0, torch.finfo(torch.float32).min, x)
        x[:, 0] = 0.5
    return x.to(DEVICE)


def indices(rows: int, vocabulary: int, x: torch.Tensor) -> torch.Tensor:
    """Both ends of the vocabulary and others; banned tokens are left to another test."""
    index = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(1))
    index[::3], index[1::3] = 0, vocabulary - 1
    index = index.to(x.device)
    banned = x.gather(1, index[:, None])[:, 0] == -INF
    return torch.where(banned, vocabulary // 2, index)


def poison(*sizes: int) -> None:
    """Leave NaN where the next allocations are likely to land: what a kernel does not write shows."""
    for size in sizes:
        for _ in range(3):
            torch.full((size,), math.nan, device=DEVICE)


def both(op, exact, inputs: list[torch.Tensor], upstream: list[torch.Tensor]):
    """Outputs and gradients of `op` on the inputs, and of its definition on them in fp64."""
    results = []
    for function, dtype in ((op, None), (exact, torch.float64)):
        leaves = [x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for x in inputs]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        total = sum((o * g.to(o.dtype)).sum() for o, g in zip(outputs, upstream, strict=True))
        results.append(
            ([o.detach().double() for o in outputs], [g.double() for g in torch.autograd.grad(total, leaves)])
        )
    return results


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize(("kind", "rows"), [("random", 0), ("random", 1), *((kind, 7) for kind in KINDS)])
def test_log_softmax(kind, rows, vocabulary):
    """Log-prob, entropy and the gradient of both."""
    if rows * vocabulary > 10**4 and kind != "near uniform" and DEVICE.type == "cpu":
        rows = 3  # the interpreter takes seconds
    x = logits_of(kind, rows, vocabulary)
    index = indices(rows, vocabulary, x)
    temperature = 1.0 if kind == "float min" else 0.7
    upstream = [torch.randn(rows, device=DEVICE), torch.randn(rows, device=DEVICE)]
    poison(rows, 2 * rows, rows * vocabulary)
    got, want = both(
        lambda z: selective_log_softmax(z, index, temperature=temperature, return_entropy=True),
        lambda z: reference.selective_log_softmax(z, index, temperature=temperature, return_entropy=True),
        [x],
        upstream,
    )
    # 1 / T is rounded to 24 bits, which counts where logits are 20,000 apart.
    tolerance = {"atol": 1e-2 if kind == "huge" else 2e-5, "rtol": 1e-5}
    torch.testing.assert_close(got, want, **tolerance)


@pytest.mark.parametrize("vocabulary", [1, 129, 1000])
@pytest.mark.parametrize(("kind", "softcap"), [*((kind, 5.0) for kind in KINDS[:3]), ("random", 0.5), ("random", 30.0)])
def test_log_softmax_of_capped_logits(kind, softcap, vocabulary):
    """Log-prob, entropy and the gradient of both; columns beyond the vocabulary have no mass though a cap is finite."""
    x = logits_of(kind, 7, vocabulary)
    index = indices(7, vocabulary, x)
    upstream = [torch.randn(7, device=DEVICE), torch.randn(7, device=DEVICE)]
    poison(7, 14, 7 * vocabulary)
    options = {"temperature": 0.7, "return_entropy": True, "softcap": softcap}
    got, want = both(
        lambda z: selective_log_softmax(z, index, **options),
        lambda z: reference.selective_log_softmax(z, index, **options),
        [x],
        upstream,
    )
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)


@triton.jit
def capped_kernel(values, out, SOFTCAP: tl.constexpr, COUNT: tl.constexpr):
    columns = tl.arange(0, COUNT)
    tl.store(out + columns, load_logits(values + columns, columns < COUNT, 0.0, SOFTCAP))


def test_a_soft_cap_is_accurate():
    """tanh to 1e-6 relative: near 0, on both sides of 0.625 and where it is 1."""
    positive = 30 * torch.cat([torch.logspace(-30, 1, 1024), torch.linspace(0.2, 1.2, 1024)])
    x = torch.cat([positive, -positive]).to(DEVICE)
    got = torch.empty_like(x)
    capped_kernel[(1,)](x, got, SOFTCAP=30.0, COUNT=len(x))
    torch.testing.assert_close(got.double(), (x.double() / 30).tanh(), atol=0, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [129, 4099])
@pytest.mark.parametrize(("entropy", "softcap"), [(True, None), (False, None), (True, 5.0)])
def test_low_precision(dtype, vocabulary, entropy, softcap):
    """16-bit logits: fp32 results as exact as those numbers in fp64, and a gradient rounded once."""
    x = (3 * logits_of("random", 7, vocabulary)).to(dtype)
    index = indices(7, vocabulary, x)
    options = {"temperature": 0.9, "return_entropy": entropy, "softcap": softcap}
    got, want = both(
        lambda z: selective_log_softmax(z, index, **options),
        lambda z: reference.selective_log_softmax(z, index, **options),
        [x],
        [torch.randn(7, device=DEVICE) for _ in range(1 + entropy)],
    )
    torch.testing.assert_close(got[0], want[0], atol=2e-5, rtol=0)
    torch.testing.assert_close(got[1], want[1], atol=1e-6, rtol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("used", ["logps", "entropy", "neither"])
def test_unused_outputs(used):
    """The gradient where only one of the outputs is used; none where a row's is 0."""
    x = logits_of("random", 7, 300)
    index = indices(7, 300, x)
    weight = torch.randn(7, device=DEVICE)
    weight[::2] = 0.0

    def total(function, z):
        logps, entropy = function(z, index, temperature=0.7, return_entropy=True)
        return ((logps if used == "logps" else entropy) * weight).sum() * (used != "neither")

    grads = []
    for function, z in ((selective_log_softmax, x), (reference.selective_log_softmax, x.double())):
        z = z.clone().requires_grad_()
        poison(x.numel())
        grads.append(torch.autograd.grad(total(function, z), z)[0].double())
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-5)
    assert grads[0][::2].eq(0).all()


def test_strides():
    """Rows apart, rows of a shifted sequence, rows in turned order, and columns apart give what their copies give."""
    base = torch.randn(3, 4, 150, device=DEVICE)
    for x in (
        base[:, :-1],
        base[:, ::2],
        base[::2, 1:, :99],
        base.transpose(0, 1),
        base[0, :, :20].T,
        base[..., ::3],
        base[0, 0],
    ):
        index = torch.randint(x.shape[-1], x.shape[:-1], device=DEVICE)
        upstream = torch.randn(x.shape[:-1], device=DEVICE)
        results = []
        for z in (x, x.clone(memory_format=torch.contiguous_format)):
            z = z.detach().requires_grad_()
            logps = selective_log_softmax(z, index)
            results.append((logps, torch.autograd.grad((logps * upstream).sum(), z)[0]))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("kind", ["many rows", "few rows"])
def test_every_tile(kind):
    """So many rows that each takes the narrower tile, and few of a vocabulary of many tiles."""
    few = 8 * processors(DEVICE) or FEW
    rows, vocabulary = (few + 3, 1000) if kind == "many rows" else (2, 20_011)
    x = logits_of("random", rows, vocabulary)
    index = indices(rows, vocabulary, x)
    upstream = [torch.randn(rows, device=DEVICE), torch.randn(rows, device=DEVICE)]
    got, want = both(
        lambda z: selective_log_softmax(z, index, return_entropy=True),
        lambda z: reference.selective_log_softmax(z, index, return_entropy=True),
        [x],
        upstream,
    )
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
    leaves = [torch.randn(rows, 4, device=DEVICE), torch.randn(vocabulary, 4, device=DEVICE)]
    got, want = both(
        lambda h, w: linear_grpo_loss(h, w, index, *upstream, normalizer=1.0)[0],
        lambda h, w: reference.linear_grpo_loss(h, w, index, *upstream, normalizer=1.0)[0],
        leaves,
        [torch.ones((), device=DEVICE)],
    )
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)


def test_offsets_beyond_32_bits():
    """A row that starts more than 2^31 entries into the tensor (virtual memory: only the rows' pages are touched)."""
    stride, rows, vocabulary = 2**30 + 16, 4, 200
    try:
        memory = torch.empty(stride * (rows - 1) + vocabulary, dtype=torch.bfloat16, device=DEVICE)
    except RuntimeError:
        pytest.skip("needs 7 GB of address space")
    x = memory.as_strided((rows, vocabulary), (stride, 1))
    x.copy_(torch.randn(rows, vocabulary))
    index = torch.tensor([0, 199, 7, 100], device=DEVICE)
    torch.testing.assert_close(
        selective_log_softmax(x, index), reference.selective_log_softmax(x.clone(), index), atol=2e-5, rtol=0
    )


@pytest.mark.parametrize("bad", [-1, -100, 200, 2**31, 2**40, -(2**62)])
def test_index_out_of_range(bad):
    """NaN in its row's outputs and 0 in its gradient, whatever lies in memory there; the neighbours are untouched."""
    memory = torch.zeros(5, 200, device=DEVICE)
    x = memory[1:4].requires_grad_()
    index = torch.tensor([1, bad, 199], device=DEVICE)
    logps, entropy = selective_log_softmax(x, index, return_entropy=True)
    assert logps.isnan().tolist() == entropy.isnan().tolist() == [False, True, False]
    (gradient,) = torch.autograd.grad(logps.sum() + entropy.sum(), x)
    assert gradient[1].eq(0).all() and gradient[0].ne(0).all() and gradient.isfinite().all()
    head = torch.randn(200, 3, device=DEVICE, requires_grad=True)
    loss, logps, _ = linear_grpo_loss(
        torch.randn(3, 3, device=DEVICE), head, index, torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE),
        mask=torch.tensor([True, False, True], device=DEVICE), normalizer=1.0,
    )  # fmt: skip
    loss.backward()
    assert logps.isnan().tolist() == [False, True, False] and head.grad.isfinite().all() and loss.isfinite()


def test_rows_that_are_not_numbers():
    """All banned, a NaN, or +inf: NaN in that row, as in the definition."""
    x = torch.randn(4, 300, device=DEVICE)
    x[0], x[1, 299], x[2, 5] = -INF, math.nan, INF
    index = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    for output in selective_log_softmax(x, index, return_entropy=True):
        assert output.isnan().tolist() == [True, True, True, False]
    for output in selective_log_softmax(x, index, return_entropy=True, softcap=5.0):  # of infinities it makes numbers
        assert output.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("temperature", [0.0, 1e-38, 1e-30, 1e-3, 1e3])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_extreme_temperatures(temperature, softcap):
    """From the greedy limit, ties shared, to nearly uniform; in value and gradient."""
    x = torch.randn(3, 130, device=DEVICE).round(decimals=1)
    x[1, 7] = x[1, 8] = x[0, 129] = x.max() + 1
    x[2, :100] = -INF
    index = torch.tensor([129, 7, 129], device=DEVICE)
    x[2, 129] = x[2].max() + 1
    options = {"temperature": temperature, "return_entropy": True, "softcap": softcap}
    got, want = both(
        lambda z: selective_log_softmax(z, index, **options),
        lambda z: reference.selective_log_softmax(z, index, **options),
        [x],
        [torch.ones(3, device=DEVICE)] * 2,
    )
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-5)
    zeros = torch.tensor([0, 0, 0], device=DEVICE)
    assert selective_log_softmax(x, zeros, temperature=0.0, softcap=softcap).eq(-INF).all()


# The surrogate

LENGTHS = [7, 1, 0, 9, 6, 3]  # more rows than a chunk has below


def tokens(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = sum(LENGTHS)
    logps = -3 * torch.rand(rows, generator=generator)
    return {
        "logps": logps,
        "old_logps": logps - 0.8 * torch.randn(rows, generator=generator),
        "ref_logps": logps + torch.randn(rows, generator=generator),
        "advantages": torch.randn(len(LENGTHS), generator=generator),
        "weights": torch.tensor([1.0, 0.5, 1.0, 2.0, 0.0, 1.5]),
        "mask": torch.rand(rows, generator=generator) < 0.8,
        "cu_seqlens": torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32),
    }


def on_device(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.to(DEVICE) for name, value in inputs.items()}


def in_fp64(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


@pytest.mark.parametrize("poisoned", [math.nan, INF, -INF])
def test_an_advantage_that_is_not_finite(poisoned):
    """The loss is not finite: the step is then skipped, never trained on a wrong number."""
    inputs = tokens()
    inputs["advantages"][0] = poisoned
    inputs = on_device(inputs)
    logps = inputs.pop("logps")
    rows = len(logps)
    hidden, weight = torch.randn(rows, 4, device=DEVICE), torch.randn(6, 4, device=DEVICE)
    index = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    assert not linear_grpo_loss(hidden, weight, index, **inputs, normalizer=1.0)[0].isfinite()


@pytest.mark.parametrize("d", [1e-5, 1e-3, -1e-3, 0.1, 0.249, 0.251, 0.99, 1.01, -1.5, 5.0, 19.0, 25.0])
def test_the_slope_of_k3_is_accurate(d):
    """The row kernel's 1 - exp(d) to 4e-6, also where the subtraction would cancel; none beyond the clamp."""
    logits = torch.zeros(1, 2, device=DEVICE)  # so that the slope in the log-prob is twice that in its logit
    one, index = torch.ones(1, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    logp = selective_log_softmax(logits, index)
    ref, out = logp + d, torch.empty_like(logits)
    rows = losses.Rows(logp, torch.zeros_like(one), ref, one.bool(), one)
    grpo_rows(logits, index, 1.0, rows, one, None, losses.Surrogate(kl_coef=1.0), out=out)
    exact = (ref.double() - logp.double()).item()
    assert 2 * out[0, 0].item() == pytest.approx(-math.expm1(exact) * (d <= 20), rel=4e-6)


# Linear


def as_good_as(plain, got, want) -> None:
    """Every output and gradient is no further from `want` (fp64) than plain PyTorch's in the same 16-bit type."""
    eps = torch.finfo(SIXTEEN_BITS).eps
    for p, g, w in zip(*(itertools.chain(*x) for x in (plain, got, want)), strict=True):
        assert (g - w).norm() <= 1.1 * (p - w).norm() + eps / 2 * w.norm()


@pytest.mark.parametrize(("rows", "vocabulary"), [(0, 129), *itertools.product((1, 19), (1, 129, 1000))])
@pytest.mark.parametrize("dtype", [torch.float32, SIXTEEN_BITS])
@pytest.mark.parametrize(("bias", "softcap"), [(True, None), (False, None), (True, 1.0)])
def test_linear_log_softmax(rows, vocabulary, dtype, bias, softcap, monkeypatch):
    """Values and gradients of hidden, weight and bias across chunks."""
    monkeypatch.setattr(linear, "chunk_rows", lambda *_: (8, 16))
    inputs = [torch.randn(*s, device=DEVICE).to(dtype) for s in ((rows, 8), (vocabulary, 8), (vocabulary,))[: 2 + bias]]
    index = torch.randint(vocabulary, (rows,), device=DEVICE)

    def run(module):
        return lambda h, w, *b: module.linear_selective_log_softmax(
            h, w, index, bias=b[0] if b else None, temperature=0.7, return_entropy=True, softcap=softcap
        )

    poison(rows, rows * 8, vocabulary * 8)
    upstream = [torch.randn(rows, device=DEVICE) for _ in range(2)]
    got, want = both(run(linear), run(reference), inputs, upstream)
    if dtype == torch.float32:
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
    else:
        as_good_as(both(run(reference), run(reference), inputs, upstream)[0], got, want)


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", ["token", "sequence"])
@pytest.mark.parametrize("dtype", [torch.float32, SIXTEEN_BITS])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kl_coef": 0.3, "dual_clip": 1.5},
        {"kl_coef": 0.3, "kl_estimator": "k1", "entropy_coef": 0.5},
        {"kl_coef": 0.3, "entropy_coef": 0.5, "softcap": 0.5},
    ],
)
def test_linear_grpo_loss(importance, aggregation, dtype, options, monkeypatch):
    """Loss, log-probs, statistics and gradients of the composed definition; what does not count is full of NaN."""
    vocabulary = 261
    monkeypatch.setattr(linear, "chunk_rows", lambda *_: (16, 24))
    inputs = on_device(tokens())
    del inputs["logps"]
    for name in ("old_logps", "ref_logps"):
        inputs[name] = torch.where(inputs["mask"], inputs[name] - 5, math.nan)  # near those of the head below
    rows = sum(LENGTHS)
    leaves = [torch.randn(*s, device=DEVICE).to(dtype) / 2 for s in ((rows, 8), (vocabulary, 8), (vocabulary,))]
    index = torch.randint(vocabulary, (rows,), device=DEVICE)
    options = {**options, "importance": importance, "aggregation": aggregation, "normalizer": 5.0}
    if "dual_clip" in options:  # a supervised term, on masked rows too
        options["nll_weights"] = 0.2 * (torch.arange(rows, device=DEVICE) % 3).float()

    def run(module, kind):
        values = in_fp64(inputs) if kind == torch.float64 else inputs
        h, w, b = (x.to(kind, copy=True).requires_grad_() for x in leaves)
        loss, logps, stats = module.linear_grpo_loss(h, w, index, bias=b, temperature=0.7, **values, **options)
        loss.backward()
        return [loss.detach().double(), logps.double(), stats], [x.grad.double() for x in (h, w, b)]

    got, want = run(rethinker_kernels, dtype), run(reference, torch.float64)
    dual_clipped = want[0][2][losses.GRPO_STATS.index("dual_clipped")]
    assert importance == "sequence" or "dual_clip" not in options or dual_clipped > 0
    if dtype == torch.float32:
        torch.testing.assert_close(got, want, atol=3e-5, rtol=1e-4)
    else:
        as_good_as(run(reference, dtype), got, want)


def test_linear_grpo_loss_needs():
    """A frozen head gets no gradient and hidden states still do, and the other way round; nothing under no_grad."""
    inputs = on_device(tokens())
    del inputs["logps"]
    index = torch.randint(50, (sum(LENGTHS),), device=DEVICE)
    values = [torch.randn(sum(LENGTHS), 4, device=DEVICE), torch.randn(50, 4, device=DEVICE)]
    values_of = []
    for frozen in (0, 1):
        leaves = [v.clone().requires_grad_(i != frozen) for i, v in enumerate(values)]
        loss, *_ = linear_grpo_loss(*leaves, index, **inputs, normalizer=1.0)
        loss.backward()
        assert leaves[frozen].grad is None and leaves[1 - frozen].grad.abs().sum() > 0
        values_of.append(loss.item())
    with torch.no_grad():
        values_of.append(linear_grpo_loss(*values, index, **inputs, normalizer=1.0)[0].item())
    assert values_of[0] == values_of[1] == pytest.approx(values_of[2], rel=1e-6)


@pytest.mark.parametrize(("entropy_coef", "softcap"), [(0.0, None), (0.5, None), (0.0, 0.5), (0.5, 0.5)])
@pytest.mark.parametrize("dtype", [torch.float32, SIXTEEN_BITS])
def test_any_loss(dtype, entropy_coef, softcap, monkeypatch):
    """CISPO, which no kernel knows: the kernels of log-probs and of their gradient around autograd on a vector."""
    monkeypatch.setattr(linear, "chunk_rows", lambda *_: (16, 24))
    inputs = on_device(tokens())
    old = inputs.pop("logps") - 3
    given = (old, inputs["advantages"])
    more = {"mask": inputs["mask"], "cu_seqlens": inputs["cu_seqlens"], "normalizer": 5.0, "entropy_coef": entropy_coef}
    more["softcap"] = softcap
    index = torch.randint(261, (len(old),), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    leaves = [torch.randn(*s, device=DEVICE).to(dtype) / 2 for s in ((len(old), 8), (261, 8))]

    def cispo(logps, rows):
        return -(logps.detach() - rows.old_logps).exp().clamp(max=1.3) * rows.advantages * logps

    def plain(h, w):
        return reference.linear_policy_loss(h, w, index, cispo, *given, **more)[0]

    one = [torch.ones((), device=DEVICE)]
    got, want = both(lambda h, w: linear_policy_loss(h, w, index, cispo, *given, **more)[0], plain, leaves, one)
    if dtype == torch.float32:
        torch.testing.assert_close(got, want, atol=3e-5, rtol=1e-4)
    else:
        as_good_as(both(plain, plain, leaves, one)[0], got, want)


@pytest.mark.parametrize("entropy_coef", [0.0, -0.5])
@pytest.mark.parametrize("options", [{}, {"kl_coef": 0.3, "dual_clip": 1.5, "clip_low": 0.1}])
def test_the_row_kernel_is_the_open_path(options, entropy_coef, monkeypatch):
    """GRPO by its kernel, and as a function that no kernel knows: the same in value, statistics and gradients."""
    monkeypatch.setattr(linear, "chunk_rows", lambda *_: (16, 24))
    inputs = on_device(tokens())
    rows = len(inputs.pop("logps"))
    index = torch.randint(261, (rows,), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    head = [torch.randn(*shape, device=DEVICE) / 2 for shape in ((rows, 8), (261, 8))]

    def unknown(logps, rows, **settings):
        return grpo(logps, rows, **settings)

    def run(loss):
        leaves = [values.clone().requires_grad_() for values in head]
        more = {"normalizer": 5.0, "surrogate": Surrogate(**options), "entropy_coef": entropy_coef}
        value, *rest = linear_policy_loss(*leaves, index, partial(loss, **options), **inputs, **more)
        return [value, *rest, *torch.autograd.grad(value, leaves)]

    torch.testing.assert_close(run(grpo), run(unknown), atol=3e-5, rtol=1e-4)


# Registration


def test_two_runs_agree_bit_for_bit():
    """Outputs, statistics and gradients of every op."""
    inputs = on_device(tokens())
    rows = len(inputs.pop("logps"))
    leaves = [torch.randn(n, 8, device=DEVICE) for n in (rows, 261)]
    index = torch.arange(rows, device=DEVICE)
    runs = []
    for _ in range(2):
        hidden, weight = (leaf.clone().requires_grad_() for leaf in leaves)
        loss, logps, stats = linear_grpo_loss(hidden, weight, index, **inputs, normalizer=3.0)
        loss.backward()
        runs.append((loss.detach(), logps, stats, hidden.grad, weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("op", ["log_softmax", "linear", "log_softmax, soft cap", "linear, soft cap"])
def test_registration(op):
    """torch.library's own checks: schema, fake implementation and autograd registration agree with the op."""
    rows = 19
    index = torch.randint(40, (rows,), device=DEVICE)
    hidden = torch.randn(rows, 4, device=DEVICE, requires_grad=True)
    weight = torch.randn(40, 4, device=DEVICE, requires_grad=True)
    logits = torch.randn(rows, 40, device=DEVICE, requires_grad=True)
    library = torch.ops.rethinker
    call = {
        "log_softmax": (library.selective_log_softmax, (logits, index, 0.7, True)),
        "log_softmax, soft cap": (library.selective_log_softmax, (logits, index, 0.7, True, 2.0)),
        "linear": (library.linear_selective_log_softmax, (hidden, weight, None, index, 0.7, None, True)),
        "linear, soft cap": (library.linear_selective_log_softmax, (hidden, weight, None, index, 0.7, 2.0, True)),
    }
    torch.library.opcheck(*call[op], test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
