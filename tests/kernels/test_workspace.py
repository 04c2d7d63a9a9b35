"""What linear_grpo_loss allocates at a real head, counted on tensors without data: no GPU is needed to know it."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rethinker_kernels import linear, linear_grpo
from rethinker_kernels.triton_kernels import linear as row_kernel

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


@pytest.mark.parametrize(("width", "vocabulary", "gigabytes"), [(2048, 151_936, 1.5), (3584, 152_064, 2.19)])
def test_workspace_at_a_real_head(width, vocabulary, gigabytes, monkeypatch):
    """Beyond the gradients it returns, one pass over 16,384 bf16 rows takes an fp32 weight gradient and a chunk of
    logits, never both together with the narrowed gradient; the logits alone would take 5 GB."""
    for settings in (linear.CHUNK_BYTES, linear.MULTIPLE):
        monkeypatch.setitem(settings, "cpu", settings["cuda"])
    # The GPU's way on tensors without data: the row kernel and the fp32-accumulating product allocate nothing more.
    monkeypatch.setattr(linear_grpo, "takes_triton", lambda hidden: True)
    monkeypatch.setattr(linear, "_add_product", lambda total, a, b: None)
    monkeypatch.setattr(row_kernel, "grpo_rows_", lambda logits, *_: (torch.empty(len(logits)),) * 2)
    with FakeTensorMode():
        hidden = torch.empty(ROWS, width, dtype=torch.bfloat16)
        weight = torch.empty(vocabulary, width, dtype=torch.bfloat16)
        index = torch.zeros(ROWS, dtype=torch.int64)
        per_row = torch.zeros(ROWS)
        with Peak(hidden, weight, index, per_row) as peak:
            terms = linear_grpo._Terms(hidden, per_row, per_row, None, None, None, None, None, "token")
            *_, gradients = linear_grpo._one_pass(
                hidden, weight, None, index, None, 1.0, terms, (True, True, False), None
            )
        returned = sum(gradient.untyped_storage().nbytes() for gradient in gradients)
    assert returned == 2 * width * (ROWS + vocabulary)
    assert gigabytes - 0.1 < (peak.most - returned) / 1e9 < gigabytes
    assert (peak.most - returned) / 1e9 < 2 * ROWS * vocabulary / 1e9 / 2
