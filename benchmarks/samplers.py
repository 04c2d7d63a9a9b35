"""What can draw in proportion to changing weights: our sum tree and its peers, as the replay benchmark calls them.

Each method is a function of the weights fp64 [N]; a peer is imported where it is used and says why it cannot be.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from rethinker_kernels import SumTree

BATCH = 512

Method = dict[str, Callable]
"""`update` (indices, priorities), `sample` () and, where there is one, `sample without replacement` ()."""


class Unavailable(Exception):
    """A peer cannot be measured here; the message says why."""


def sum_tree(weights: Tensor) -> Method:
    """Ours: the public class."""
    tree = SumTree(len(weights))
    generator = torch.Generator(tree.device).manual_seed(0)
    tree.update(torch.arange(len(weights)), weights)
    return {
        "update": tree.update,
        "sample": lambda: tree.sample(BATCH, generator=generator),
        "sample without replacement": lambda: tree.sample(BATCH, generator=generator, replacement=False),
    }


def multinomial(weights: Tensor) -> Method:
    table = weights.float()
    return {
        "update": lambda indices, new: table.index_put_((indices,), new.float()),
        "sample": lambda: torch.multinomial(table, BATCH, replacement=True),
        "sample without replacement": lambda: torch.multinomial(table, BATCH, replacement=False),
    }


def searchsorted(weights: Tensor) -> Method:
    table = weights.clone()

    def sample() -> Tensor:
        ends = table.cumsum(0)
        points = torch.rand(BATCH, dtype=torch.float64, device=table.device) * ends[-1]
        return torch.searchsorted(ends, points, right=True)

    return {"update": lambda indices, new: table.index_put_((indices,), new), "sample": sample}


def torchrl_tree(weights: Tensor) -> Method:
    import numpy

    tree = torchrl_extension().SumSegmentTreeFp32(len(weights))
    tree[torch.arange(len(weights))] = weights.float()

    def sample() -> Tensor:
        mass = numpy.random.uniform(0.0, tree.query(0, len(weights)), size=BATCH)
        return torch.as_tensor(tree.scan_lower_bound(mass))

    return {"update": lambda indices, new: tree.update(indices, new.float()), "sample": sample}


def torchrl_extension() -> ModuleType:
    """torchrl's C++ module, without importing the package around it."""
    spec = importlib.util.find_spec("torchrl")
    if spec is None or spec.origin is None:
        raise Unavailable("torchrl is not installed")
    folder = Path(spec.origin).parent
    for library in folder.glob("_torchrl*.so"):
        found = importlib.util.spec_from_file_location("_torchrl", library)
        try:
            module = importlib.util.module_from_spec(found)
            found.loader.exec_module(module)
        except ImportError:
            continue  # built for another PyTorch
        return module
    from torch.utils import cpp_extension

    sources = [str(folder / "csrc" / name) for name in ("pybind.cpp", "utils.cpp")]
    try:
        return cpp_extension.load("_torchrl", sources, extra_cflags=["-O3"])
    except (OSError, RuntimeError) as error:
        raise Unavailable(f"torchrl's sources do not compile: {str(error).splitlines()[0]}") from None


def sumtree_package(weights: Tensor) -> Method:
    try:
        import sumtree
    except ImportError as error:
        raise Unavailable(str(error)) from None
    tree = sumtree.SumTree(len(weights))
    for weight in weights.tolist():
        tree.add(weight)
    return {
        "update": lambda indices, new: tree.update_batched(indices.tolist(), new.tolist()),
        "sample": lambda: torch.tensor(tree.sample(BATCH)[0]),
    }


METHODS: dict[str, Callable[[Tensor], Method]] = {
    "rethinker C++": sum_tree,
    "torch.multinomial": multinomial,
    "cumsum + searchsorted": searchsorted,
    "torchrl SumSegmentTree": torchrl_tree,
    "sumtree": sumtree_package,
}
OURS = ("rethinker C++",)
