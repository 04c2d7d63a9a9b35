"""Rethinker: reinforcement learning that teaches vision-language models to think slowly.

`rethinker.train(recipe, overrides)` runs a recipe from Python. Importing the package imports neither torch nor vLLM.
"""

from __future__ import annotations

import importlib
from typing import Any

from rethinker.version import __version__

__all__ = ["__version__"]


def __getattr__(name: str) -> Any:
    if name == "train":
        return importlib.import_module("rethinker.train")
    raise AttributeError(f"module 'rethinker' has no attribute {name!r}")
