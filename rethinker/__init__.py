"""Rethinker: reinforcement learning that teaches vision-language models to think slowly.

`rethinker.train(recipe, overrides)` runs a recipe from Python. Importing the package imports neither torch nor vLLM.
"""

from rethinker.train import train
from rethinker.version import __version__

__all__ = ["__version__", "train"]
