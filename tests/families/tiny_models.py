"""A tiny random model of each family, as a folder: the family's own architecture and processor, only small."""

from __future__ import annotations

from pathlib import Path

import rethinker.families
from rethinker.embedded.tiny import create_tiny, write_random
from rethinker.embedded.tokenizer import train_tokenizer
from rethinker.families import family_of

FAMILIES = [
    "-".join(filter(None, (name, kind))) for name in rethinker.families.FAMILIES for kind in family_of(name).TINY
]


def create(family: str, folder: str | Path, seed: int = 0, **sizes: int) -> Path:
    """Write a tiny model of the family (a config's `model_type`, and the kind where there are several) to `folder`."""
    name, _, kind = family.partition("-")
    if name == "qwen2_5_vl":  # the embedded default
        return create_tiny(folder, seed)
    kinds = {"kind": kind} if kind else {}
    return write_random(folder, *family_of(name).tiny(train_tokenizer(()), **kinds, **sizes), seed)
