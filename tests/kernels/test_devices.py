"""Every Triton kernel is launched with its tensors' GPU as the current one; the current GPU is a mock here."""

from __future__ import annotations

from contextlib import contextmanager
from importlib import import_module
from pkgutil import iter_modules

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rethinker_kernels.devices import on_device_of
from rethinker_kernels.losses import Rows, Surrogate

pytest.importorskip("triton", reason="needs triton, which this platform has no package of")
from rethinker_kernels import triton_kernels
from rethinker_kernels.triton_kernels import exponentials, linear_loss, log_softmax, merge_attention

MODULES = [import_module(found.name) for found in iter_modules(triton_kernels.__path__, f"{triton_kernels.__name__}.")]
R, D, V = 2, 16, 90_000


def launch_everything() -> None:
    """Through every launcher of the package."""
    rows, index = torch.empty(R), torch.zeros(R, dtype=torch.int64)
    logits, out = torch.empty(R, V), torch.empty(R, V, dtype=torch.bfloat16)
    *_, saved = log_softmax.forward_rows(logits, index, 1.0, True)
    log_softmax.gradient_rows(logits, index, 1.0, saved, rows, rows, rows, out=out)
    known = Rows(rows, rows, None, rows.bool(), rows)
    linear_loss.grpo_rows(logits, index, 1.0, known, rows, None, Surrogate(), out=out)
    linear_loss.scaled(logits, torch.empty(()), torch.bfloat16)
    head = [torch.empty(n, D, dtype=torch.bfloat16) for n in (R, V)]
    product = exponentials.Exponentials(*head, index, 1.0, out)
    product.repeat(product.measure(rows, True)[2])
    product.close(rows)
    heads, scores = torch.empty(R, 2, D), torch.empty(2, R)
    merge_attention.merge_attention(heads, scores, heads, scores, index)


def test_every_launch_is_guarded(monkeypatch):
    """Each kernel finds the GPU of its launcher's tensors current."""
    current, launches, kernels = [0], {}, set()

    @contextmanager
    def guard(tensor):
        current[0] += 1
        yield
        current[0] -= 1

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid):
            return lambda *_, **__: launches.setdefault(self.name, set()).add(current[0])

    for module in MODULES:
        monkeypatch.setattr(module, "on_device_of", guard)
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            kernels.add(f"{module.__name__}.{name}")
            monkeypatch.setattr(module, name, Kernel(f"{module.__name__}.{name}"))
    assert len(kernels) >= 7
    launch_everything()
    assert launches == {kernel: {1} for kernel in kernels}


def test_the_guard(monkeypatch):
    """With cuda:0 current, a tensor on cuda:1 makes that current, and cuda:0 again afterwards; a CPU tensor nothing."""
    current = [0]

    def exchange(index: int) -> int:
        before, current[0] = current[0], index if index >= 0 else current[0]
        return before

    for name in ("_exchange_device", "_maybe_exchange_device"):
        monkeypatch.setattr(torch.cuda, name, exchange)
    with FakeTensorMode():
        for device, expected in (("cuda:1", 1), ("cpu", 0)):
            with on_device_of(torch.empty(3, device=device)):
                assert current == [expected]
            assert current == [0]
