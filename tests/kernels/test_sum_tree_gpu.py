"""The CUDA sum tree: the CPU's results bit for bit, in one launch, on any stream and in CUDA graphs."""

from __future__ import annotations

import pytest
import torch

from rethinker_kernels import SumTree, native
from tests.kernels.sum_trees import generator, parents_are_exact

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def toolkit():
    try:
        native.find_nvcc()
    except native.BuildError as error:
        pytest.skip(str(error))
    native.load("cuda")


def trees(capacity: int, alpha: float = 1.0) -> tuple[SumTree, SumTree]:
    return SumTree(capacity, alpha=alpha), SumTree(capacity, "cuda", alpha=alpha)


def filled(capacity: int) -> SumTree:
    tree = SumTree(capacity, "cuda")
    tree.update(torch.arange(capacity), torch.rand(capacity, generator=generator()))
    return tree


@pytest.mark.parametrize(("capacity", "alpha"), [(1, 0.5), (40, 2.0), (3_000, 1.0), (1 << 20, 0.7)])
def test_bit_for_bit_the_cpu(capacity, alpha):
    """Updates with duplicates and zeros and draws of both kinds, in more than one tile: the same nodes and slots."""
    cpu, cuda = trees(capacity, alpha)
    assert cuda.device.type == "cuda"
    source = generator(capacity)
    for step in range(100):
        n = int(torch.randint(2_000, (1,), generator=source))
        indices = torch.randint(capacity, (n,), generator=source)
        scales = 10.0 ** torch.randint(-12, 2, (n,), generator=source).double()
        priorities = torch.rand(n, generator=source, dtype=torch.float64) * scales
        priorities[torch.rand(n, generator=source) < 0.4] = 0
        key = torch.tensor([step, -step])
        for tree in (cpu, cuda):
            tree.update(indices, priorities)
        assert torch.equal(cpu._nodes, cuda._nodes.cpu())
        positive = int(cpu._levels[0].count_nonzero())
        for count, replacement in ((n, True), (min(n, positive), False)):
            if positive:
                got = cuda.sample(count, generator=key.cuda(), replacement=replacement)
                assert torch.equal(cpu.sample(count, generator=key, replacement=replacement), got.cpu())
    assert parents_are_exact(cuda)


def test_refused_updates_change_nothing_and_are_raised_later():
    """On the device an update is all or nothing; `check` names the first that was refused, once."""
    tree = filled(100)
    before = tree._nodes.clone()
    tree.update(torch.tensor([1, 2], device="cuda"), torch.tensor([1.0, torch.nan], device="cuda"))
    tree.update(torch.tensor([1, 100], device="cuda"), torch.tensor([1.0, 1.0], device="cuda"))
    assert torch.equal(tree._nodes, before)
    with pytest.raises(ValueError, match="nan at index 2 must be"):
        tree.check()
    tree.check()
    tree.update(torch.tensor([100], device="cuda"), torch.tensor([1.0], device="cuda"))
    with pytest.raises(ValueError, match=r"indices: 100 is outside \[0, 100\)"):
        tree.state_dict()


@pytest.mark.parametrize("n", [1, 17, 512, 5_000, 60_000])
def test_draws_without_replacement(n):
    """From equal weights, where a few draws repeat, and from very unequal ones, where most do: the CPU's slots, each
    once, in one round or in many; the tree is as it was."""
    capacity, key = 100_000, torch.tensor([3, n])
    for priorities in (torch.ones(capacity), 10.0 ** torch.linspace(-4, 8, capacity, dtype=torch.float64)):
        cpu, cuda = trees(capacity)
        for tree in (cpu, cuda):
            tree.update(torch.arange(capacity), priorities)
        for _ in range(3):
            got = cuda.sample(n, generator=key.cuda(), replacement=False)
            assert torch.equal(got.cpu(), cpu.sample(n, generator=key, replacement=False))
            assert torch.equal(cuda._nodes.cpu(), cpu._nodes)
            key[1] += 1


@pytest.mark.parametrize("replacement", [True, False])
def test_draws_from_too_little_are_marked(replacement):
    """-1 where nothing is left, and the slots before that are whole; the tree is as it was."""
    tree = SumTree(100, "cuda")
    assert tree.sample(5, generator=None, replacement=replacement).tolist() == [-1] * 5
    tree.update(torch.tensor([7, 9]), torch.ones(2))
    before = tree._nodes.clone()
    drawn = tree.sample(4, generator=torch.tensor([1, 2], device="cuda"), replacement=replacement).tolist()
    assert set(drawn) <= {7, 9} if replacement else sorted(drawn) == [-1, -1, 7, 9]
    assert torch.equal(tree._nodes, before)


def test_other_stream():
    """Work queued on a stream of its own reads what that stream wrote before."""
    tree, key = filled(100_000), torch.tensor([1, 2], device="cuda")
    indices, priorities = torch.arange(1000, device="cuda"), torch.rand(1000, device="cuda").double()
    reference = SumTree(100_000)
    reference.load_state_dict(tree.state_dict())
    reference.update(indices.cpu(), priorities.cpu())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        tree.update(indices.clone(), priorities.clone())
        drawn = [tree.sample(512, generator=key, replacement=r) for r in (True, False)]
    stream.synchronize()
    for got, r in zip(drawn, (True, False), strict=True):
        assert torch.equal(got.cpu(), reference.sample(512, generator=key.cpu(), replacement=r))


def test_cuda_graph():
    """An update and draws, captured once and replayed with new priorities and offsets: the eager results. Nothing in
    them waits for the device, or the capture would fail."""
    tree, key = filled(100_000), torch.tensor([1, 0], device="cuda")
    reference = SumTree(100_000)
    reference.load_state_dict(tree.state_dict())
    indices, priorities = torch.arange(512, device="cuda"), torch.ones(512, dtype=torch.float64, device="cuda")

    def step() -> torch.Tensor:
        tree.update(indices, priorities)
        drawn = tree.sample(512, generator=key)
        key[1] += 1
        return drawn

    tree.sample(1, generator=key)  # loads the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for offset in range(3):
        indices.copy_(torch.randint(100_000, (512,), generator=generator(offset)))
        priorities.copy_(torch.rand(512, generator=generator(offset + 9)))
        graph.replay()
        reference.update(indices.cpu(), priorities.cpu())
        assert torch.equal(captured.cpu(), reference.sample(512, generator=torch.tensor([1, offset])))
