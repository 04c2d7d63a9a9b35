"""Makes torchvision importable in every Python that has this folder on its PYTHONPATH; see ../torchvision_cpu.py."""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent


def _run(spec):
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# By its path: the package it belongs to need not be importable here.
_file = _HERE.parent / "torchvision_cpu.py"
_run(importlib.util.spec_from_file_location("_torchvision_cpu", _file)).make_importable()

# A sitecustomize that this one hides still runs.
_others = [entry for entry in sys.path if Path(entry or ".").resolve() != _HERE]
_hidden = importlib.machinery.PathFinder.find_spec("sitecustomize", _others)
if _hidden and _hidden.loader:
    _run(_hidden)
