"""What linear_grpo_loss allocates at a real head, counted on tensors without data: no GPU is needed to know it."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rethinker_kernels import linear, linear_grpo_loss, linear_loss
from rethinker_kernels.chunks import CPU_LOGITS_BYTES, WORKSPACE, chunk_bytes, chunk_rows
from rethinker_kernels.linear_loss import scaled
from rethinker_kernels.losses import Objective, grpo
from rethinker_kernels.triton_kernels import linear_loss as row_kernel

ROWS = 16_384


class Peak(TorchDispatchMode):
    """Most bytes alive at once in storages that were made under it."""

    def __init__(self, *inputs: torch.Tensor) -> None:
        super().__init__()
        self.bytes = self.most = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in inputs}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.bytes += storage.nbytes()
                    self.most = max(self.most, self.bytes)
                    weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        return result

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.bytes -= size


HEADS = [(2048, 151_936, 1.6), (3584, 152_064, 2.31)]
"""(D, V, GB beyond the returned gradients) of Qwen2.5-VL 3B and 7B."""


@pytest.mark.parametrize(("width", "vocabulary", "gigabytes"), HEADS)
def test_workspace_at_a_real_head(width, vocabulary, gigabytes, monkeypatch):
    """Beyond the gradients it returns, a step over 16,384 bf16 rows takes, forward, the weight's fp32 gradient, a
    chunk's logits and their gradient (1.6 GB at 3B); backward that fp32 gradient and hidden's, unscaled (2.3 GB at 7B,
    of which 2.2 are the fp32 gradient). All logits alone would take 5 GB in bf16."""
    monkeypatch.setattr(linear, "processors", lambda device: 132)
    # The GPU's way on tensors without data: the kernels and the products allocate nothing more.
    monkeypatch.setattr(linear_loss, "takes_triton", lambda hidden: True)
    monkeypatch.setattr(linear, "product", lambda a, b, out, add=False: None)
    monkeypatch.setattr(row_kernel, "grpo_rows", lambda logits, *_, out: (logits.new_empty(len(logits)),) * 2)
    monkeypatch.setattr(row_kernel, "scaled", lambda gradient, _, dtype: torch.empty_like(gradient, dtype=dtype))
    with FakeTensorMode():
        hidden, weight = (torch.empty(n, width, dtype=torch.bfloat16) for n in (ROWS, vocabulary))
        index, per_row, one = torch.zeros(ROWS, dtype=torch.int64), torch.zeros(ROWS), torch.ones(())
        with Peak(hidden, weight, index, per_row) as peak:
            objective = Objective(grpo, per_row, per_row, per_row, normalizer=1.0)
            head, needs = linear.Head(hidden, weight, None, index, 1.0), (True, True, False)
            sums = linear_loss.one_pass(head, objective, None, needs)[2].wide()
            forward = peak.most
            returned = [scaled(gradient, one, torch.bfloat16) for gradient in sums]
        returned = sum(gradient.untyped_storage().nbytes() for gradient in returned)
    assert returned == 2 * width * (ROWS + vocabulary)
    assert gigabytes - 0.1 < (peak.most - returned) / 1e9 < gigabytes
    chunk = chunk_bytes(ROWS, width, vocabulary, 2, 132)
    assert forward - returned == pytest.approx(2 * width * vocabulary + chunk, rel=0.01)


def test_the_backward_pass_makes_the_gradients_and_nothing_else():
    """No zeros stand for the gradients of outputs that have none: one of those outputs is as large as the weight."""
    hidden, weight = (torch.randn(n, 64).bfloat16().requires_grad_() for n in (8, 5_000))
    index = torch.arange(8)
    loss, *_ = linear_grpo_loss(hidden, weight, index, torch.zeros(8), torch.ones(8), normalizer=8.0)
    with Peak(hidden, weight, *loss.grad_fn.saved_tensors) as peak:
        loss.backward()
    assert peak.most < 1.1 * 2 * weight.numel()


@pytest.mark.parametrize("processors", [108, 132, 148])
@pytest.mark.parametrize(("width", "vocabulary"), [(896, 151_936), *(head[:2] for head in HEADS), (8192, 152_064)])
@pytest.mark.parametrize("rows", [0, 1, 500, 3_000, ROWS])
def test_chunk_rows_of_real_heads(rows, width, vocabulary, processors):
    """Whole tiles, no more than there are rows, within the bound on memory, and at most 9 passes over 16,384 rows."""
    logits, products = chunk_rows(rows, width, vocabulary, 2, processors)
    assert (logits % 128 == 0 and products % 128 == 0 and products < rows + 128) or rows == 0
    taken = 2 * width * vocabulary + chunk_bytes(rows, width, vocabulary, 2, processors)
    assert taken <= max(WORKSPACE, 4 * width * vocabulary)
    assert math.ceil(rows / max(products, 1)) <= 9
    same, in_place = chunk_rows(rows, width, vocabulary, 4, processors)
    assert same == in_place and chunk_bytes(rows, width, vocabulary, 4, processors) <= WORKSPACE


@pytest.mark.parametrize(("width", "vocabulary"), [head[:2] for head in HEADS])
def test_chunks_fill_the_processors(width, vocabulary):
    """On an H100 or H200 the hidden states' gradient keeps at least 95% of the processors at work."""
    _, products = chunk_rows(ROWS, width, vocabulary, 2, 132)
    tiles = math.ceil(products / 128) * math.ceil(width / 256)
    assert tiles / (math.ceil(tiles / 132) * 132) > 0.95


@pytest.mark.parametrize("element_size", [2, 4, 8])
def test_chunk_rows_on_a_cpu(element_size):
    """Logits within their bound, at least a row."""
    for vocabulary in (10, 151_936, 10**9):
        logits, products = chunk_rows(10**6, 64, vocabulary, element_size, 0)
        assert logits == products >= 1
        assert logits == 1 or logits * vocabulary * max(element_size, 4) <= CPU_LOGITS_BYTES
