"""A tiny random model of each family, as a folder: the family's own architecture and processor, only small."""

from __future__ import annotations

from pathlib import Path

import rethinker.families
from rethinker.embedded.tiny import write_random
from rethinker.embedded.tokenizer import train_tokenizer
from rethinker.families import family_of

# All but the default family, which the other tests hold to the same laws.
FAMILIES = [name for name in rethinker.families.FAMILIES if name != "qwen2_5_vl"]


def create(family: str, folder: str | Path, seed: int = 0, **sizes: int) -> Path:
    """Write a tiny model of the family (a config's `model_type`) to `folder`."""
    return write_random(folder, *family_of(family).tiny(train_tokenizer(()), **sizes), seed)
