"""The CUDA kernels' source, run thread by thread on a CPU (cuda_on_host.h): the CPU ops' results bit for bit.

This checks the kernels' logic under random thread orders; memory ordering and speed only a GPU shows.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from ctypes import CDLL
from pathlib import Path

import pytest
import torch

from rethinker_kernels import SumTree, native
from tests.kernels.sum_trees import filled, generator, require_compiler

LAUNCH = re.compile(r"(\w+)<<<(.*?), 0, static_cast<cudaStream_t>\(stream\)>>>\((.*?)\);", re.DOTALL)


def emulated(folder: Path, fault: tuple[str, str] | None = None) -> CDLL:
    """The library as the CUDA kernels make it, or as copies with one text replaced by another do."""
    source = (native.SOURCES / "sum_tree_cuda.cu").read_text()
    if fault:
        assert source.count(fault[0]) == 1
        source = source.replace(*fault)
    source, launches = LAUNCH.subn(r"fibers::run(\2, [&] { \1(\3); });", source)
    assert launches == 2
    seed = 'extern "C" void seed(unsigned value) { fibers::order.seed(value); }'
    folder.mkdir(exist_ok=True)
    (folder / "kernels.cpp").write_text(f'#include "cuda_on_host.h"\n{source}\n{seed}')
    library = folder / "kernels.so"
    flags = ["-O1", "-std=c++17", "-fPIC", "-shared", "-ffp-contract=off", "-fno-strict-aliasing", "-w"]
    flags += ["-U_FORTIFY_SOURCE"]  # its longjmp wants one stack
    includes = [f"-I{native.SOURCES}", f"-I{Path(__file__).parent}"]
    command = [*native.cxx(), *flags, *includes, str(folder / "kernels.cpp"), "-o", str(library)]
    subprocess.run(command, check=True, timeout=60)
    return native.opened(library)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> CDLL:
    require_compiler()
    return emulated(tmp_path_factory.mktemp("kernels"))


def disagreement(kernels: CDLL, capacity: int, alpha: float, steps: int, largest: int) -> str | None:
    """The first operation in which the kernels and the CPU ops differ."""
    source = generator(capacity)
    cpu, cuda = SumTree(capacity, alpha=alpha), SumTree(capacity, alpha=alpha)
    cuda._library = kernels
    for step in range(steps):
        kernels.seed(step)
        n = int(torch.randint(1, largest, (1,), generator=source))
        indices = torch.randint(capacity, (n,), generator=source)
        scales = 10.0 ** torch.randint(-12, 2, (n,), generator=source).double()
        priorities = torch.rand(n, generator=source, dtype=torch.float64) * scales
        priorities[torch.rand(n, generator=source) < 0.4] = 0
        for tree in (cpu, cuda):
            tree.update(indices, priorities)
        if not torch.equal(cpu._nodes, cuda._nodes):
            return f"update {step}"
        key, positive = torch.tensor([step, -step]), int(cpu._levels[0].count_nonzero())
        draws = (min(n, 100), True), (min(positive, n), False)
        for count, replacement in draws if positive else ():
            drawn = [tree.sample(count, generator=key, replacement=replacement) for tree in (cpu, cuda)]
            if not torch.equal(*drawn) or not torch.equal(cpu._nodes, cuda._nodes):
                return f"sample {step}, replacement={replacement}"
    return None


@pytest.mark.parametrize(
    ("capacity", "alpha", "steps", "largest"),
    [(1, 0.5, 5, 40), (40, 2.0, 10, 600), (3_000, 1.0, 4, 1_300), (40_000, 0.7, 3, 1_300)],
)
def test_kernels_agree_with_the_cpu(kernels, capacity, alpha, steps, largest):
    """Updates with duplicates and zeros, within a warp, over warps and over tiles, and draws of both kinds."""
    assert disagreement(kernels, capacity, alpha, steps, largest) is None


@pytest.mark.parametrize(
    "fault",
    [
        ("if (present) atomicMax(&table.place[at]", "if (present) atomicExch(&table.place[at]"),  # any write holds
        ("change = weight - exchange(nodes + slot, weight);", "change = weight;"),
        ("static_cast<uint32_t>(draw), round);", "static_cast<uint32_t>(draw), 0);"),
        ("if (lane >= distance) running += other;", "if (lane > distance) running += other;"),
        ("if (__all_sync(kWarp, !active || slot == node)) {", "if (true) {"),
    ],
)
def test_planted_faults_are_noticed(fault, tmp_path):
    """The comparison above sees each of these faults, or the fault crashes: hence a process of its own."""
    require_compiler()
    kernels = emulated(tmp_path, fault)
    child = os.fork()
    if not child:
        noticed = False
        with contextlib.suppress(Exception):
            noticed = disagreement(kernels, 3_000, 1.0, 6, 1_300) is not None
        os._exit(10 if noticed else 0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 10


def test_refused_updates_change_nothing(kernels):
    """An update with a bad priority or index, in any tile, is refused whole and its first fault is reported."""
    tree = filled(torch.ones(2_000))
    tree._library = kernels
    before, priorities = tree._nodes.clone(), torch.full((1_500,), 2.0)
    priorities[[700, 1_200]] = torch.tensor([-3.0, torch.nan])
    with pytest.raises(ValueError, match=r"^priorities: -3.0 at index 700 must be"):
        tree.update(torch.arange(1_500), priorities)
    with pytest.raises(ValueError, match=r"^indices: 2000 is outside"):
        tree.update(torch.arange(501, 2_001), torch.ones(1_500))
    assert torch.equal(tree._nodes, before)


def test_too_few_slots_are_marked(kernels):
    """Draws that find every weight 0 are -1, and the tree is as it was."""
    tree, key = filled([0.0, 1.0, 0.0, 2.0]), torch.tensor([1, 2])
    tree._library, before = kernels, tree._nodes.clone()
    assert sorted(tree._draw_distinct(key, 6).tolist()) == [-1, -1, -1, -1, 1, 3] and torch.equal(tree._nodes, before)
    tree.update(torch.arange(4), torch.zeros(4))
    assert tree._draw(key, 6).tolist() == [-1] * 6
