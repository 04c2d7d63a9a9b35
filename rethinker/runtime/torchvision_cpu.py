"""Lets torchvision's PyPI wheel (a CUDA build) be imported beside a CPU build of torch.

That wheel's C++ library needs CUDA libraries. Without it the import stops at `torchvision::nms`, whose schema the
library would have defined, although image transforms use no C++ operator. Declaring the schemas is enough.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

SITE_FOLDER = Path(__file__).parent / "site"

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_library = None  # torch forgets the schemas when their Library object dies


def make_importable() -> None:
    """Declare the schemas torchvision's import needs, if its own library cannot; call before importing torchvision.

    Does nothing when torchvision is absent, when its library loads, and when called again.
    """
    global _library
    if _library is not None:
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return
    import torch

    if _declared("nms") or any(_loads(path) for path in Path(spec.submodule_search_locations[0]).glob("_C*.so")):
        return
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in _SCHEMAS.items():
        if not _declared(name):
            _library.define(schema)


def child_environment() -> dict[str, str]:
    """Environment variables under which every Python started from here (vLLM's own processes) makes the same repair.

    Returns:
        `{"PYTHONPATH": ...}`: the present one with the folder of our `sitecustomize` in front.
    """
    folders = [str(SITE_FOLDER), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {"PYTHONPATH": os.pathsep.join(dict.fromkeys(folders))}


def _declared(name: str) -> bool:
    import torch

    return hasattr(torch.ops.torchvision, name)


def _loads(library: Path) -> bool:
    import torch

    try:
        torch.ops.load_library(str(library))
    except OSError:
        return False
    return True
