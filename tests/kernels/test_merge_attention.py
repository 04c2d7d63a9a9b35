"""merge_attention: in PyTorch, in Triton's interpreter, and on a GPU."""

from __future__ import annotations

import os

import pytest
import torch

from rethinker_kernels.devices import takes_triton
from rethinker_kernels.merge_attention import merge_attention
from tests.kernels.interpreter import Interpreter

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("queries, heads, width", [(1, 1, 8), (65, 3, 80), (130, 2, 32), (40, 4, 128)])
def test_merges(queries, heads, width, heads_first, dtype):
    """The chosen rows are those of a softmax over both sets, also where one set weighs nothing; the others stay to the
    bit; what the second part says of them, be it NaN, is not read."""
    generator = torch.Generator().manual_seed(queries)
    shape = (heads, queries, width) if heads_first else (queries, heads, width)

    def tensor(scale=1.0, *, of=shape, to=dtype):
        return (scale * torch.randn(of, generator=generator, dtype=torch.float64)).to(DEVICE, to)

    out, other = (tensor().transpose(0, 1) if heads_first else tensor() for _ in range(2))
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    lse, other_lse = (tensor(40.0, of=(heads, queries), to=sums) for _ in range(2))
    rows = torch.randperm(queries, generator=generator)[: queries - queries // 4].sort().values.to(DEVICE)
    kept = torch.ones(queries, dtype=torch.bool, device=DEVICE).index_fill(0, rows, False)
    other[kept], other_lse[:, kept] = torch.nan, torch.inf
    before, before_lse = out.clone(), lse.clone()
    merge_attention(out, lse, other, other_lse, rows)

    a, b = before_lse.double().t()[..., None], other_lse.double().t()[..., None]
    total = torch.logaddexp(a, b)
    expected = (a - total).exp() * before.double() + (b - total).exp() * other.double()
    assert torch.equal(out[kept], before[kept]) and torch.equal(lse[:, kept], before_lse[:, kept])
    torch.testing.assert_close(out[rows].double(), expected[rows], rtol=0, atol=8 * TOLERANCES[dtype])
    torch.testing.assert_close(lse.double()[:, rows], total[rows, :, 0].t(), rtol=TOLERANCES[sums], atol=0)


def test_no_row_is_nothing():
    """No query sees both sets: nothing changes."""
    out, lse = torch.randn(3, 2, 8, device=DEVICE), torch.randn(2, 3, device=DEVICE)
    before = out.clone(), lse.clone()
    merge_attention(out, lse, torch.ones_like(out), torch.ones_like(lse), torch.zeros(0, dtype=int, device=DEVICE))
    assert torch.equal(out, before[0]) and torch.equal(lse, before[1])


def test_the_triton_kernel_in_the_interpreter(tmp_path):
    """The tests above once more, with the Triton kernel in Triton's interpreter."""
    pytest.importorskip("triton", reason="needs triton, which this platform has no package of")
    interpreter = Interpreter(tmp_path / "output")
    status, output = interpreter.run(
        "tests/kernels/test_merge_attention.py", "-k", "not in_the_interpreter and not float64"
    )
    interpreter.close()
    assert status == 0, output[-4000:]


def test_which_kernel_this_is():
    """Otherwise the interpreter's run would test PyTorch."""
    assert takes_triton(torch.zeros(1, device=DEVICE)) == (INTERPRETED or DEVICE == "cuda")
