"""Lets torchvision's PyPI wheel (a CUDA build) be imported beside a CPU build of torch.

That wheel's C++ library needs CUDA libraries. Without it the import stops at `torchvision::nms`, whose schema the
library would have defined, although image transforms use no C++ operator. Declaring the schemas is enough; that happens
when torchvision's code is about to run, so a process that never imports it pays nothing.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

SITE_FOLDER = Path(__file__).parent / "site"

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_library = None  # torch forgets the schemas when their Library object dies


class _BeforeTorchvision:
    """Meta-path finder whose spec for torchvision declares its operators before it runs the package."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name) if name == "torchvision" else None
        if spec and spec.loader and spec.origin:
            run = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (declare_operators(Path(spec.origin).parent), run(module))[1]
        return spec


def make_importable() -> None:
    """Call before importing torchvision; calling again changes nothing."""
    if _BeforeTorchvision not in sys.meta_path:
        sys.meta_path.insert(0, _BeforeTorchvision)


def child_environment() -> dict[str, str]:
    """The PYTHONPATH with our `sitecustomize` in front, under which every Python started from here (vLLM's own
    processes) makes torchvision importable for itself."""
    folders = [str(SITE_FOLDER), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {"PYTHONPATH": os.pathsep.join(dict.fromkeys(folders))}


def declare_operators(package: Path) -> None:
    """Declare what torchvision's import needs, if neither its own library, in its folder `package`, nor anybody did."""
    global _library
    import torch

    def declared(name: str) -> bool:
        return hasattr(torch.ops.torchvision, name)

    for library in () if declared("nms") else package.glob("_C*.so"):
        with suppress(OSError):  # it needs CUDA's
            torch.ops.load_library(str(library))
    if declared("nms"):
        return
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in _SCHEMAS.items():
        if not declared(name):
            _library.define(schema)
