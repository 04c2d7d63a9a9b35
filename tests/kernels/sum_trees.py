"""What the sum tree's tests share: trees, draws, exactness, the G-test, and csrc's header as a Python object."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest
import scipy.stats
import torch
from torch import Tensor

from rethinker_kernels import SumTree, native

ALARM = 1e-6
"""A p-value below this is a fault. Seeds are fixed, so a sound sampler passes always."""


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def filled(priorities, alpha: float = 1.0) -> SumTree:
    """A tree of these priorities, all of them written at once."""
    priorities = torch.as_tensor(priorities, dtype=torch.float64)
    tree = SumTree(len(priorities), alpha=alpha)
    tree.update(torch.arange(len(priorities)), priorities)
    return tree


def counts(tree: SumTree, draws: int, seed: int = 0) -> Tensor:
    """How often each slot comes in so many draws [capacity]."""
    source, total = generator(seed), torch.zeros(tree.capacity, dtype=torch.int64)
    for _ in range(draws // 100_000):
        total += tree.sample(100_000, generator=source).bincount(minlength=tree.capacity)
    return total


def g_test(observed: Tensor, probabilities: Tensor) -> float:
    """p-value of the log-likelihood ratio test; no draws where the probability is 0 are required, not tested."""
    possible = probabilities > 0
    assert observed[~possible].eq(0).all()
    observed, expected = observed[possible].double(), probabilities[possible].double()
    expected = expected / expected.sum() * observed.sum()
    return scipy.stats.power_divergence(observed.numpy(), expected.numpy(), lambda_="log-likelihood").pvalue


def parents_are_exact(tree: SumTree) -> bool:
    """Whether every node equals the sum of its 32 children, added as Python integers."""
    for children, parents in itertools.pairwise(tree._levels):
        blocks = children.view(-1, 32).tolist()
        if parents[: len(blocks)].tolist() != [sum(block) for block in blocks] or parents[len(blocks) :].any():
            return False
    return True


def dense_slots(n: int) -> Tensor:
    """Of n slots of equal weight, those [n] that get one more of 2^24 evenly spaced numbers than the others do."""
    edges = torch.arange(n + 1, dtype=torch.float64) * (2**24 / n)
    reached = edges.ceil().diff()
    return reached > reached.min()


def require_compiler() -> None:
    """Skip where there is no C++ compiler."""
    try:
        native.cxx()
    except native.BuildError as error:
        pytest.skip(str(error))


class Probe:
    """The arithmetic of csrc/sum_tree.h, or of a copy with one text replaced by another."""

    def __init__(self, folder: Path, fault: tuple[str, str] | None = None) -> None:
        header = (native.SOURCES / "sum_tree.h").read_text()
        if fault:
            assert header.count(fault[0]) == 1
            header = header.replace(*fault)
        (folder / "sum_tree.h").write_text(header)
        source = shutil.copy(Path(__file__).parent / "sum_tree_probe.cpp", folder)
        library = folder / "probe.so"
        command = [*native.cxx(), *native.CXX_FLAGS, "-shared", source, "-o"]
        subprocess.run([*command, str(library)], check=True, timeout=60)
        self._library = ctypes.CDLL(str(library))
        self._library.probe_multiply_high.restype = ctypes.c_uint64
        self._library.probe_layout.restype = ctypes.c_int64

    def philox(self, counter: Iterable[int], key: Iterable[int]) -> list[int]:
        words = (ctypes.c_uint32 * 4)(*counter)
        self._library.probe_philox(words, *map(ctypes.c_uint32, key))
        return list(words)

    def random(self, key: Tensor, n: int, step: int = 0) -> list[int]:
        """The numbers of n draws, below 2^64."""
        out = (ctypes.c_uint64 * n)()
        seed, offset = map(ctypes.c_int64, key.tolist())
        self._library.probe_random(seed, offset, ctypes.c_int64(n), ctypes.c_uint32(step), out)
        return list(out)

    def multiply_high(self, x: int, y: int) -> int:
        return self._library.probe_multiply_high(ctypes.c_uint64(x), ctypes.c_uint64(y))

    def power(self, x: Tensor, alpha: float) -> Tensor:
        out = torch.empty_like(x)
        self._library.probe_power(_pointer(x), ctypes.c_double(alpha), ctypes.c_int64(len(x)), _pointer(out))
        return out

    def slots(self, tree: SumTree, numbers: list[int]) -> list[int]:
        """The slots that 64-bit random numbers lead to."""
        n, out = len(numbers), torch.empty(len(numbers), dtype=torch.int64)
        random = (ctypes.c_uint64 * n)(*numbers)
        capacity = ctypes.c_int64(tree.capacity)
        self._library.probe_slots(_pointer(tree._nodes), capacity, random, ctypes.c_int64(n), _pointer(out))
        return out.tolist()

    def layout(self, capacity: int) -> tuple[list[int], int, int]:
        """Starts of the levels (0 where there is none), number of nodes, fraction bits."""
        begin, fraction = (ctypes.c_int64 * 8)(), ctypes.c_int()
        size = self._library.probe_layout(ctypes.c_int64(capacity), begin, ctypes.byref(fraction))
        return list(begin), size, fraction.value


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())
