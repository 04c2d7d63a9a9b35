"""The head's product that leaves exponentials, in the interpreter (fp32) or on a Hopper GPU (bf16), against fp64.

Not collected by itself, as fuzz_triton.py is not, and run beside it.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import rethinker_kernels
from benchmarks import reference
from rethinker_kernels import devices, linear, linear_grpo_loss, linear_policy_loss, linear_selective_log_softmax
from rethinker_kernels.triton_kernels import exponentials
from tests.kernels.fuzz_triton import DEVICE, LENGTHS, as_good_as, both, in_fp64, on_device, poison, tokens

DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32  # the interpreter's bf16 products are no reference


@pytest.fixture(autouse=True)
def products(monkeypatch):
    """How many products each test made; several chunks each. What a test draws depends on it alone."""
    torch.manual_seed(0)
    if DEVICE.type == "cpu":
        one = lambda hidden, weight, bias, temperature: bias is None  # noqa: E731
        monkeypatch.setattr(linear, "takes_exponentials", one)
    elif torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU: others have fp32 logits")
    monkeypatch.setattr(linear, "chunk_rows", lambda *_: (16, 24))
    made = []
    plain = exponentials.Exponentials._product
    monkeypatch.setattr(
        exponentials.Exponentials, "_product", lambda self, *given: (made.append(self), plain(self, *given))
    )
    yield made
    assert made, "fp32 logits were taken instead"


def head(rows: int, vocabulary: int, width: int, size: float = 1.0) -> tuple[torch.Tensor, ...]:
    """Hidden states and a weight that make logits of about `size`, and tokens."""
    g = torch.Generator().manual_seed(rows * 7919 + vocabulary)
    hidden = (size * torch.randn(rows, width, generator=g)).to(DEVICE, DTYPE)
    weight = (torch.randn(vocabulary, width, generator=g) / width**0.5).to(DEVICE, DTYPE)
    return hidden, weight, torch.randint(vocabulary, (rows,), generator=g).to(DEVICE)


def compare(plain, got, want) -> None:
    """To fp32 in the interpreter; on a GPU as good as PyTorch in bf16, which rounds the logits too."""
    if DEVICE.type == "cpu":
        torch.testing.assert_close(got, want, atol=5e-5, rtol=1e-4)
    elif want[0][0].count_nonzero():
        as_good_as(plain, got, want)
    else:  # a vocabulary of one: PyTorch is exact there
        torch.testing.assert_close(got, want, atol=5e-5, rtol=0)


def rounding(hidden, weight, index, temperature: float, upstream) -> list[torch.Tensor]:
    """What fp32 logits cost: eps of the largest sum of |terms| of a row, for its log-prob and, relatively, each of its
    probabilities. The gradient of hidden adds up those of a row, that of weight those of all rows, in quadrature."""
    hidden, weight, upstream = hidden.double(), weight.double(), upstream.double()
    probs = (hidden @ weight.T / temperature).softmax(-1)
    each = torch.finfo(torch.float32).eps * (hidden.abs() @ weight.abs().T / temperature).amax(-1)
    chosen = torch.zeros_like(probs).scatter_(1, index[:, None], 1.0)
    slopes = (upstream.abs() * each / temperature)[:, None] * (probs + chosen)
    return [each, slopes @ weight.abs(), (slopes.T.square() @ hidden.square()).sqrt()]


@pytest.mark.parametrize("rows", [1, 33])
@pytest.mark.parametrize(("vocabulary", "width"), [(1, 8), (31, 16), (129, 40), (500, 24)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs(rows, vocabulary, width, temperature):
    """Values, entropies and the gradients of log-probs, over tiles that do not fit the sizes."""
    hidden, weight, index = head(rows, vocabulary, width, 3.0)
    poison(rows, 3 * rows, rows * vocabulary)
    upstream = [torch.randn(rows, device=DEVICE)]

    def run(module):
        return lambda h, w: module.linear_selective_log_softmax(h, w, index, temperature=temperature)

    got, want = both(run(linear), run(reference), [hidden, weight], upstream)
    if DEVICE.type == "cpu":
        bounds = rounding(hidden, weight, index, temperature, upstream[0])
        for g, w, bound in zip(itertools.chain(*got), itertools.chain(*want), bounds, strict=True):
            assert ((g - w).abs() / bound).max() <= 4
    else:
        compare(both(run(reference), run(reference), [hidden, weight], upstream)[0], got, want)
    with torch.no_grad():
        given = {"temperature": temperature, "return_entropy": True}
        values = linear_selective_log_softmax(hidden, weight, index, **given)
        exact = reference.linear_selective_log_softmax(hidden.double(), weight.double(), index, **given)
    for value, e in zip(values, exact, strict=True):
        torch.testing.assert_close(value.double(), e, atol=2e-5, rtol=1e-5)


def test_near_uniform_logits():
    """A column beyond the vocabulary would weigh exp(5) here."""
    hidden, weight, index = head(5, 37, 8, 1e-3)
    hidden[:, 0], weight[:, 0] = 1.0, -5.0
    got = linear_selective_log_softmax(hidden, weight, index, return_entropy=True)
    want = reference.linear_selective_log_softmax(hidden.double(), weight.double(), index, return_entropy=True)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, atol=2e-5, rtol=1e-5)


def grpo(module, kind, leaves, index, inputs, options):
    """Loss, log-probs and statistics, and both gradients, of one type."""
    h, w = (x.to(kind, copy=True).requires_grad_() for x in leaves)
    values = in_fp64(inputs) if kind == torch.float64 else inputs
    loss, logps, stats = module.linear_grpo_loss(h, w, index, **values, **options)
    loss.backward()
    return [loss.detach().double(), logps.double(), stats], [h.grad.double(), w.grad.double()]


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("options", [{}, {"kl_coef": 0.3, "dual_clip": 1.5}, {"temperature": 1.3}])
def test_grpo(importance, options):
    """Loss, log-probs, statistics and gradients of the composed definition; what does not count is full of NaN."""
    inputs = on_device(tokens())
    del inputs["logps"]
    for name in ("old_logps", "ref_logps"):
        inputs[name] = torch.where(inputs["mask"], inputs[name] - 3, math.nan)
    hidden, weight, index = head(sum(LENGTHS), 261, 16, 2.0)
    options = {**options, "importance": importance, "normalizer": 5.0}
    if "dual_clip" in options:  # a supervised term, on masked rows too
        options["nll_weights"] = 0.2 * (torch.arange(len(index), device=DEVICE) % 3).float()
    given = ((hidden, weight), index, inputs, options)
    got, want = grpo(rethinker_kernels, DTYPE, *given), grpo(reference, torch.float64, *given)
    compare(grpo(reference, DTYPE, *given), got, want)


@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_an_entropy_bonus_has_logits(importance, products):
    """The gradient of entropies is not one factor a row of the exponentials: it is made from logits, also where
    log-probs and entropies were measured on exponentials."""
    inputs = on_device(tokens())
    del inputs["logps"], inputs["ref_logps"]
    inputs["old_logps"] -= 3
    hidden, weight, index = head(sum(LENGTHS), 261, 16, 2.0)
    options = {"importance": importance, "normalizer": 5.0, "entropy_coef": 0.5, "temperature": 0.8}
    given = ((hidden, weight), index, inputs, options)
    got, want = grpo(rethinker_kernels, DTYPE, *given), grpo(reference, torch.float64, *given)
    compare(grpo(reference, DTYPE, *given), got, want)
    assert bool(products) == (importance == "sequence")
    products.append(None)


def test_any_loss():
    """CISPO, which no kernel knows, takes the same product."""
    inputs = on_device(tokens())
    del inputs["logps"], inputs["ref_logps"]
    inputs["old_logps"] -= 3
    hidden, weight, index = head(sum(LENGTHS), 261, 16, 2.0)

    def cispo(logps, rows):
        return -(logps.detach() - rows.old_logps).exp().clamp(max=1.3) * rows.advantages * logps

    def fused(h, w):
        return linear_policy_loss(h, w, index, cispo, **inputs, normalizer=5.0)[0]

    def plain(h, w):
        return reference.linear_policy_loss(h, w, index, cispo, **inputs, normalizer=5.0)[0]

    one = [torch.ones((), device=DEVICE)]
    got, want = both(fused, plain, [hidden, weight], one)
    compare(both(plain, plain, [hidden, weight], one)[0], got, want)


@pytest.mark.parametrize("old", ["near", "0", "-1e4", "nan"])
def test_any_old_log_prob_will_do(old, products):
    """Tokens so unlikely that the guessed offset overflows, and old log-probs that say nothing: exact all the same."""
    rows = 26
    hidden, weight, index = head(rows, 300, 24, 1.0)
    hidden[::3] *= 60  # log-probs down to -200 nats
    exact = reference.linear_selective_log_softmax(hidden.double(), weight.double(), index)
    guesses = {"near": exact.float(), "0": 0.0, "-1e4": -1e4, "nan": math.nan}
    inputs = {
        "old_logps": torch.zeros(rows, device=DEVICE) + guesses[old],
        "advantages": torch.ones(rows, device=DEVICE),
        "mask": torch.zeros(rows, dtype=torch.bool, device=DEVICE),
    }
    if old == "near":
        inputs["mask"] = ~inputs["mask"]
    options = {"normalizer": 3.0, "nll_weights": torch.ones(rows, device=DEVICE)}
    given = ((hidden, weight), index, inputs, options)
    got, want = grpo(rethinker_kernels, DTYPE, *given), grpo(reference, torch.float64, *given)
    compare(grpo(reference, DTYPE, *given), got, want)
    torch.testing.assert_close(got[0][1], exact, atol=1e-4, rtol=1e-6)
    assert any(product.work[1] > 0 for product in products), "no product was made a second time"


def test_the_second_product_is_the_exception(products):
    """With old log-probs near the new ones no tile is computed twice."""
    hidden, weight, index = head(40, 300, 24, 2.0)
    logps = reference.linear_selective_log_softmax(hidden.float(), weight.float(), index)
    inputs = {"old_logps": logps + 0.1, "advantages": torch.ones(40, device=DEVICE)}
    linear_grpo_loss(hidden.requires_grad_(), weight, index, **inputs, normalizer=1.0)
    assert all(product.work[1] == 0 for product in products)


def test_out_of_range():
    """A token that does not exist: NaN for its row, no gradient from it, and nothing else touched."""
    hidden, weight, index = head(9, 50, 8, 2.0)
    index[2], index[5] = 50, -1
    real = (index >= 0) & (index < 50)
    leaf = hidden.clone().requires_grad_()
    logps, entropy = linear_selective_log_softmax(leaf, weight, index, return_entropy=True)
    assert torch.equal(logps.isnan(), ~real) and torch.equal(entropy.isnan(), ~real)
    logps = linear_selective_log_softmax(leaf, weight, index)
    logps[real].sum().backward()
    exact = hidden[real].double().requires_grad_()
    reference.linear_selective_log_softmax(exact, weight.double(), index[real]).sum().backward()
    assert leaf.grad[~real].count_nonzero() == 0
    eps = torch.finfo(DTYPE).eps
    torch.testing.assert_close(leaf.grad[real].double(), exact.grad, atol=4 * eps, rtol=4 * eps)


def test_without_a_gradient_of_any_output():
    """Zeros for hidden states and the weight, which no product is needed for."""
    hidden, weight, index = head(20, 50, 8)
    _, entropies, saved = linear.log_softmax_op(hidden, weight, None, index, 1.0, None, True)
    given = (hidden, weight, None, index, 1.0, None, saved, entropies, None, None, True, True, False)
    poison(20 * 8, 50 * 8)
    for gradient, like in zip(linear.log_softmax_backward_op(*given)[:2], (hidden, weight), strict=True):
        assert torch.equal(gradient, torch.zeros_like(like))


def test_two_runs_agree_bit_for_bit():
    """Loss, log-probs, statistics and gradients."""
    inputs = on_device(tokens())
    del inputs["logps"]
    hidden, weight, index = head(sum(LENGTHS), 261, 16, 2.0)
    runs = [grpo(rethinker_kernels, DTYPE, (hidden, weight), index, inputs, {"normalizer": 5.0}) for _ in range(2)]
    assert all(torch.equal(a, b) for x, y in zip(*runs, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize(
    ("why", "change"),
    [
        ("a bias", {"bias": torch.zeros(4)}),
        ("a temperature of 0", {"temperature": 0.0}),
        ("no temperature at all", {"temperature": math.inf}),
        ("fp16", {"hidden": torch.zeros(2, 8, dtype=torch.float16)}),
        ("rows not 16 bytes apart", {"hidden": torch.zeros(2, 12, device=DEVICE, dtype=torch.bfloat16)[:, :8]}),
    ],
)
def test_other_inputs_have_logits(why, change, products):
    """Each is left to the other path."""
    products.append(None)  # none is made here
    given = {
        "hidden": torch.zeros(2, 8, dtype=torch.bfloat16),
        "weight": torch.zeros(4, 8, dtype=torch.bfloat16),
        "bias": None, "temperature": 1.0,
    }  # fmt: skip
    on = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in (given | change).items()}
    assert not devices.takes_exponentials(**on), why
