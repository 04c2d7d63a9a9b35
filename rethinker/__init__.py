"""Rethinker: reinforcement learning that teaches vision-language models to think slowly.

`rethinker.train(recipe, overrides)` runs a recipe from Python. Importing the package imports neither torch nor vLLM.
"""

import os

# Torch reads it at its first allocation: large CPU tensors in huge pages spare most page faults. Measured with the tiny
# model on one thread: rollout and training take 15% less CPU time.
if os.path.isdir("/sys/kernel/mm/transparent_hugepage"):
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

from rethinker.train import train
from rethinker.version import __version__

__all__ = ["__version__", "train"]
