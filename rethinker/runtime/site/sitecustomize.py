"""Makes torchvision importable in every Python that has this folder on its PYTHONPATH (see ../torchvision_cpu.py).

The repair runs when torchvision's code is about to, so a child that never imports it pays nothing.
"""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

_HERE = Path(__file__).parent


class _BeforeTorchvision:
    """Meta-path finder whose spec for torchvision repairs its operators before it runs the package."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "torchvision":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name)
        if spec and spec.loader:
            run = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (_repair(), run(module))[1]
        return spec


def _repair():
    name = "_torchvision_cpu"  # by its path: the package it belongs to need not be importable here
    spec = importlib.util.spec_from_file_location(name, _HERE.parent / "torchvision_cpu.py")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    sys.modules[name].make_importable()


sys.meta_path.insert(0, _BeforeTorchvision)

# A sitecustomize that this one hides still runs.
_others = [entry for entry in sys.path if Path(entry or ".").resolve() != _HERE.resolve()]
_hidden = importlib.machinery.PathFinder.find_spec("sitecustomize", _others)
if _hidden and _hidden.loader:
    _hidden.loader.exec_module(importlib.util.module_from_spec(_hidden))
