"""The compiled sum tree ops and their PyTorch equivalents agree bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rethinker_kernels import SumTree
from tests.kernels.sum_tree_torch import TorchTree
from tests.kernels.sum_trees import generator, parents_are_exact, require_compiler


@pytest.fixture(autouse=True)
def compiler():
    require_compiler()


def pair(capacity: int, alpha: float) -> tuple[SumTree, SumTree]:
    """A compiled tree and a PyTorch one."""
    return SumTree(capacity, alpha=alpha), TorchTree(capacity, alpha=alpha)


def outcome(method: Callable[..., Tensor | None], *arguments, **options) -> list | str | None:
    """What a call returns or raises."""
    try:
        result = method(*arguments, **options)
        return None if result is None else result.tolist()
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(("capacity", "alpha"), [(1, 0.5), (7, 0.0), (40, 2.0), (3_000, 1.0), (40_000, 0.7)])
def test_a_million_mixed_operations(capacity, alpha):
    """Five times 200,000 updates and draws, with and without replacement, with duplicates, zeros, refused priorities,
    trees of zeros and too few slots: the same nodes, draws and errors."""
    source, trees, done, step = generator(capacity), pair(capacity, alpha), 0, 0
    while done < 200_000:
        n = int(torch.randint(1_000, (1,), generator=source))
        indices = torch.randint(capacity, (n,), generator=source)
        scales = 10.0 ** torch.randint(-20, 2, (n,), generator=source).double()
        priorities = torch.rand(n, generator=source, dtype=torch.float64) * scales
        priorities[torch.rand(n, generator=source) < 0.4] = 0
        if step % 10 == 9 and n:
            priorities[n // 2] = (torch.nan, torch.inf, -1.0, 1e300)[step // 10 % 4]
        if step % 25 == 24:
            indices, priorities = torch.arange(capacity), torch.zeros(capacity, dtype=torch.float64)
        updated = [outcome(tree.update, indices, priorities) for tree in trees]
        key = torch.tensor([step, -step])
        for replacement in (True, False):
            drawn = [outcome(tree.sample, n, generator=key, replacement=replacement) for tree in trees]
            assert drawn[0] == drawn[1]
        assert updated[0] == updated[1]
        assert torch.equal(trees[0]._nodes, trees[1]._nodes)
        done, step = done + 3 * n, step + 1
    assert all(parents_are_exact(tree) for tree in trees)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0, 2.0, 7.5])
def test_every_priority_has_the_same_weight(alpha):
    """From subnormal numbers to the largest accepted, at every alpha."""
    exponents = torch.linspace(-1074, 27 / max(alpha, 1.0) - 1e-9, 20_000, dtype=torch.float64)
    compiled, plain = pair(len(exponents), alpha)
    for tree in (compiled, plain):
        tree.update(torch.arange(len(exponents)), 2.0**exponents)
    assert torch.equal(compiled._nodes, plain._nodes)
    assert (plain._levels[0][: len(exponents)] > 0).all()
