"""The compiled sum tree ops and their PyTorch equivalents agree bit for bit, and behave as torch ops should."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rethinker_kernels import SumTree, sum_tree_torch
from tests.kernels.sum_trees import generator, parents_are_exact, require_compiler


@pytest.fixture(autouse=True)
def compiler():
    require_compiler()


def pair(capacity: int, alpha: float) -> tuple[SumTree, SumTree]:
    """A compiled tree and a PyTorch one."""
    compiled, plain = SumTree(capacity, alpha=alpha), SumTree(capacity, alpha=alpha)
    plain._ops = sum_tree_torch
    return compiled, plain


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


def op_arguments() -> dict[str, tuple]:
    tree = SumTree(100)
    tree.update(torch.arange(100), torch.ones(100))
    key, slots = torch.tensor([1, 2]), torch.empty(10, dtype=torch.int64)
    update = torch.arange(5), torch.ones(5, dtype=torch.float64), tree._refused
    return {
        "update_": (tree._nodes, 100, 1.0, *update),
        "sample_": (tree._nodes, 100, key, slots),
        "sample_distinct_": (tree._nodes, 100, key, slots, torch.empty_like(slots), tree._ended),
    }


@pytest.mark.parametrize("name", ["update_", "sample_", "sample_distinct_"])
def test_the_ops_obey_torch_library(name):
    """Schema (what is written and what is not), fake implementation and tracing, as torch.compile relies on them."""
    op = getattr(torch.ops.rethinker, f"sum_tree_{name}").default
    torch.library.opcheck(op, op_arguments()[name], test_utils=("test_schema", "test_faketensor"))


def test_torch_compile_takes_the_ops_whole():
    """A traced update and draw are the eager ones, without a graph break."""
    arguments = op_arguments()
    ops = torch.ops.rethinker

    def step(nodes, indices, priorities, refused, key, slots):
        ops.sum_tree_update_(nodes, 100, 1.0, indices, priorities * 3, refused)
        ops.sum_tree_sample_(nodes, 100, key, slots)
        return slots + 1

    tensors = [arguments["update_"][i] for i in (0, 3, 4, 5)] + [arguments["sample_"][i] for i in (2, 3)]
    eager = [tensor.clone() for tensor in tensors]
    want = step(*eager)
    got = torch.compile(step, backend="aot_eager", fullgraph=True)(*tensors)
    assert torch.equal(got, want)
    assert all(torch.equal(a, b) for a, b in zip(tensors, eager, strict=True))


@pytest.mark.parametrize(
    ("name", "position", "wrong", "message"),
    [
        ("update_", 0, torch.zeros(5, dtype=torch.int64), "nodes: must hold"),
        ("update_", 1, 1 << 40, "capacity="),
        ("update_", 4, torch.ones(4, dtype=torch.float64), "priorities: must hold 5"),
        ("update_", 4, torch.ones(5), "Double"),
        ("update_", 3, torch.arange(10)[::2], "indices: must be contiguous"),
        ("sample_", 2, torch.zeros(3, dtype=torch.int64), "key: must hold 2"),
        ("sample_distinct_", 4, torch.zeros(3, dtype=torch.int64), "taken: must hold 10"),
        ("sample_distinct_", 5, torch.zeros(2, dtype=torch.int64), "ended: must hold 1"),
    ],
)
def test_the_ops_refuse_what_they_would_misread(name, position, wrong, message):
    """Called directly with a wrong size, type or stride, an op raises before it touches memory."""
    arguments = list(op_arguments()[name])
    arguments[position] = wrong
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.rethinker, f"sum_tree_{name}")(*arguments)
