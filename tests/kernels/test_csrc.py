"""csrc: its arithmetic against Python integers, its build, and what nvcc makes of it."""

from __future__ import annotations

import itertools
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rethinker_kernels import SumTree, native
from rethinker_kernels.sum_tree import levels_of
from tests.kernels import sum_tree_torch
from tests.kernels.sum_tree_torch import TorchTree
from tests.kernels.sum_trees import ALARM, Probe, dense_slots, filled, g_test, require_compiler

U32, U64 = 2**32 - 1, 2**64 - 1


@pytest.fixture(scope="module")
def probe(tmp_path_factory) -> Probe:
    require_compiler()
    return Probe(tmp_path_factory.mktemp("probe"))


def in_torch(counter: list[int], key: list[int]) -> list[int]:
    """The first two words of the PyTorch Philox; the counter's words are the draw, the round and the offset."""
    words = key[0] | key[1] << 32, counter[2] | counter[3] << 32
    signed = [word - 2**64 if word >= 2**63 else word for word in words]
    high, low = sum_tree_torch.random_64(torch.tensor(signed), torch.tensor([counter[0]]), counter[1])
    return [low.item(), high.item()]


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([U32] * 4, [U32] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(probe, counter, key, answer):
    """Philox4x32-10 gives the known answers of Random123's kat_vectors, in C++ and in PyTorch."""
    assert probe.philox(counter, key) == answer
    assert in_torch(counter, key) == answer[:2]


def test_random_numbers_of_seed_offset_draw_and_round(probe):
    """The 64-bit numbers are the same in C++ and PyTorch for seeds and offsets of either sign, and all differ."""
    seen = []
    for seed, offset, step in ((0, 0, 0), (-1, 5, 0), (1 << 40, -(1 << 63), 1), (1 << 40, -(1 << 63), 2)):
        key = torch.tensor([seed, offset])
        high, low = sum_tree_torch.random_64(key, torch.arange(1000), step)
        numbers = probe.random(key, 1000, step)
        assert numbers == [a << 32 | b for a, b in zip(high.tolist(), low.tolist(), strict=True)]
        seen += numbers
    assert len(set(seen)) == len(seen) and max(seen) >> 63 == 1


def test_the_high_word_of_a_product_is_exact(probe):
    """floor(x * y / 2^64) over the whole range of x and totals y to 2^62, checked against Python integers."""
    numbers = random.Random(0)
    edge = [0, 1, 2**31, U32, U32 + 1, 2**62 - 1, 2**62]
    xs = [*edge, 2**63, U64 - 1, U64, *(numbers.getrandbits(64) for _ in range(200))]
    ys = [*edge, *(numbers.getrandbits(62) for _ in range(100))]
    pairs = list(itertools.product(xs, ys))
    want = [x * y >> 64 for x, y in pairs]
    assert [probe.multiply_high(x, y) for x, y in pairs] == want
    high, low, y = (torch.tensor(values) for values in zip(*((x >> 32, x & U32, y) for x, y in pairs), strict=True))
    assert sum_tree_torch.multiply_high(high, low, y).tolist() == want


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0, 2.0, 3.3])
def test_powers_are_powers(probe, alpha):
    """x^alpha within 1e-14 of extended precision wherever it becomes a weight above one unit."""
    x = 10.0 ** torch.linspace(-300, 9, 50_000, dtype=torch.float64)
    exact = x.numpy().astype("longdouble") ** alpha
    matters = (exact < 2.0**27) & (exact > 2.0**-62)
    got = probe.power(x, alpha)
    assert torch.equal(got, sum_tree_torch.power(x, alpha))
    assert (abs(got.numpy() - exact) <= 1e-14 * exact)[matters].all() and matters.any()


@pytest.mark.parametrize("capacity", [1, 2, 32, 33, 1024, 1025, 10**6, 10**7, 1 << 31])
def test_layout_and_fixed_point(probe, capacity):
    """Levels start at multiples of 256 bytes, the root comes last, and a full tree stays at or below 2^62."""
    begin, size, fraction = probe.layout(capacity)
    sizes = levels_of(capacity)
    assert begin[: len(sizes)] == [0, *itertools.accumulate(sizes[:-1])] and size == sum(sizes)
    assert sizes[-1] == 1 and all(n % 32 == 0 for n in sizes[:-1]) and sizes[0] >= capacity
    assert all(above * 32 >= below for below, above in itertools.pairwise(sizes))
    assert fraction == 62 - 27 - (capacity - 1).bit_length()
    assert capacity << 27 + fraction <= 2**62 < capacity << 28 + fraction


@pytest.mark.parametrize("capacity", [1, 2, 31, 32, 33, 1024, 1025, 40_000])
def test_every_unit_of_weight_belongs_to_one_slot(probe, capacity, monkeypatch):
    """The smallest and largest random number of each slot's interval lead to that slot, at every depth of tree."""
    numbers = random.Random(capacity)
    tree = TorchTree(capacity)
    chosen = sorted({0, capacity - 1, *(numbers.randrange(capacity) for _ in range(50))})
    tree.update(torch.tensor(chosen), torch.tensor([numbers.uniform(1e-6, 2.0) for _ in chosen], dtype=torch.float64))
    ends = list(itertools.accumulate(tree._levels[0][chosen].tolist()))
    total = ends[-1]
    first = [-(-(start << 64) // total) for start in [0, *ends[:-1]]]  # smallest x with x * total >> 64 >= start
    last = [-(-(end << 64) // total) - 1 for end in ends]
    for given in (first, last):
        assert probe.slots(tree, given) == chosen
        halves = torch.tensor([x >> 32 for x in given]), torch.tensor([x & U32 for x in given])
        monkeypatch.setattr(sum_tree_torch, "random_64", lambda *_, halves=halves: halves)
        assert tree._draw(torch.zeros(2), len(given)).tolist() == chosen


def test_planted_faults_are_noticed(tmp_path):
    """The G-test sees uniform numbers of 24 bits, and a descent whose comparisons are off by 2%."""
    require_compiler()
    dense = dense_slots(3_050_402)
    tree, expected = filled(torch.ones(len(dense))), dense.long().bincount()

    def evenness(slots) -> float:
        return g_test(dense[torch.as_tensor(slots)].long().bincount(minlength=2), expected)

    folders = [tmp_path / name for name in ("sound", "coarse", "biased")]
    for folder in folders:
        folder.mkdir()
    word = "counter[0] | static_cast<uint64_t>(counter[1]) << 32"
    key, draws = torch.tensor([3, 4]), 100_000
    sound, coarse = Probe(folders[0]), Probe(folders[1], (word, f"({word}) >> 40 << 40"))
    assert evenness(sound.slots(tree, sound.random(key, draws))) > ALARM
    assert evenness(coarse.slots(tree, coarse.random(key, draws))) < ALARM

    off = ("group += passed;", "group += running <= rest + rest / 50;")
    small, biased = filled(torch.ones(32)), Probe(folders[2], off)
    numbers = sound.random(key, draws)
    lanes = [torch.tensor(p.slots(small, numbers)).bincount(minlength=32) for p in (sound, biased)]
    assert g_test(lanes[0], torch.ones(32)) > ALARM > g_test(lanes[1], torch.ones(32))


# The build


DRAW = """
import torch
from rethinker_kernels import SumTree
tree = SumTree(1000, alpha=0.7)
tree.update(torch.arange(1000), torch.arange(1000).double())
drawn = tree.sample(300, generator=torch.tensor([1, 2]), replacement=False)
print(drawn.tolist(), tree._nodes[-1].item())
"""


def process(cache: Path) -> subprocess.Popen[str]:
    """A Python process that draws from a tree, with a cache of its own."""
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, "-c", DRAW]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_that_start_together_find_a_whole_library(tmp_path, monkeypatch, capsys):
    """Two processes with an empty cache draw the same, and leave one file; who compiles says so; a third finds it."""
    require_compiler()
    children = [process(tmp_path) for _ in range(2)]
    (out, *others), (first, *more) = zip(*(child.communicate(timeout=120) for child in children), strict=True)
    assert out and others == [out]
    said = "rethinker_kernels: compiling the cpu sum tree, once\n"
    assert said in (first, *more) and {first, *more} <= {said, ""}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.load.__wrapped__("cpu")
    assert capsys.readouterr().err == ""
    assert [path.suffix for path in (tmp_path / "rethinker_kernels").iterdir()] == [".so"]


def test_what_is_missing_is_named_in_one_line(tmp_path, monkeypatch):
    """No compiler, a failing one, a cache that cannot be written."""
    require_compiler()
    failing = tmp_path / "failing"
    failing.write_text("#!/bin/sh\nprintf 'In file included\\nsum_tree.h:1: error: no luck\\n' >&2\nexit 1\n")
    failing.chmod(0o755)
    (tmp_path / "file").write_text("")
    cases = [
        ({"CXX": "/nowhere/g++"}, r"no C\+\+ compiler \(/nowhere/g\+\+\) was found; install one or set CXX"),
        ({"CXX": str(failing)}, "the cpu sum tree does not compile: sum_tree.h:1: error: no luck"),
        ({"XDG_CACHE_HOME": str(tmp_path / "file")}, "Not a directory"),
    ]
    for environment, reason in cases:
        with monkeypatch.context() as patch:
            for name, value in ({"XDG_CACHE_HOME": str(tmp_path)} | environment).items():
                patch.setenv(name, value)
            with pytest.raises(native.BuildError, match=reason) as raised:
                native.load.__wrapped__("cpu")
            assert "\n" not in str(raised.value)


def test_a_changed_source_or_compiler_is_another_library(tmp_path, monkeypatch):
    """The cache's key holds the sources and the compiler's command: none of them can go stale."""
    require_compiler()
    sources = tmp_path / "csrc"
    sources.mkdir()
    for file in native.SOURCES.iterdir():
        (sources / file.name).write_bytes(file.read_bytes())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "SOURCES", sources)
    monkeypatch.setattr(native.subprocess, "run", lambda command, **_: Path(command[-1]).write_text(""))
    names = []
    monkeypatch.setattr(native, "opened", lambda library: names.append(library.name))
    load = native.load.__wrapped__
    load("cpu")
    load("cpu")
    with (sources / "sum_tree.h").open("a") as file:
        file.write("// changed\n")
    load("cpu")
    monkeypatch.setattr(native, "CXX_FLAGS", ["-O2"])
    load("cpu")
    assert names[0] == names[1] and len(set(names)) == 3


def test_a_tree_for_a_gpu_that_is_not_there():
    """It is an error, and no tree somewhere else."""
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a CUDA device")
    with pytest.raises(native.BuildError, match="there is no CUDA device"):
        SumTree(5, "cuda")


# The CUDA code, without a GPU


@pytest.fixture(scope="module")
def nvcc() -> str:
    try:
        return native.find_nvcc()
    except native.BuildError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_cuda_kernels_need_no_stack(nvcc, architecture, tmp_path):
    """Both kernels compile for the architecture without spills and without a stack."""
    cubin = tmp_path / "kernels.cubin"
    source = str(native.SOURCES / "sum_tree_cuda.cu")
    command = [nvcc, *native.NVCC_FLAGS, f"-arch=sm_{architecture}", "-cubin", "-o", str(cubin), source]
    done = subprocess.run([*command, "-Xptxas", "-v"], check=True, capture_output=True, text=True, timeout=120)
    usage = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert usage == [("0", "0", "0")] * 2
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
    assert len(registers) == 2 and max(registers) <= 64  # 1,024 threads fit a multiprocessor
