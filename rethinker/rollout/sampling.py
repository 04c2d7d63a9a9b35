"""What every sampling backend shares: the tokens that end a response, and seeding without side effects."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from rethinker.families import family_of

_CONFIG_PLACEHOLDERS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def stop_token_ids(tokenizer: Any, model_config: Any, generation_config: Any | None) -> list[int]:
    """Every token id that ends a response: the model's end tokens and all placeholders, sorted.

    In a response a placeholder would ask for image features that do not exist.

    Args:
        tokenizer, model_config, generation_config: as transformers loads them from the model's folder.
    """
    ids = {tokenizer.eos_token_id, *(getattr(model_config, name, None) for name in _CONFIG_PLACEHOLDERS)}
    for source in (model_config.get_text_config(), generation_config):
        end = getattr(source, "eos_token_id", None)
        ids.update(end if isinstance(end, (list, tuple)) else [end])
    added = tokenizer.get_added_vocab()
    ids.update(added.get(token) for token in family_of(model_config.model_type).PLACEHOLDERS)
    return sorted(ids - {None})


def limits(max_new_tokens: int | list[int], prompts: int) -> list[int]:
    """The longest completion of each prompt."""
    return max_new_tokens if isinstance(max_new_tokens, list) else [max_new_tokens] * prompts


def request_seed(seed: int, *numbers: int) -> int:
    """A request's own seed, 0 <= seed < 2**62, from the rollout's and what tells the request apart; vLLM adds a
    sample's number to it."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, (seed, *numbers))).encode()).digest()[:8], "big") >> 2


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Give the process's generators (torch on CPU and this rank's GPU, numpy, random) their state back at the end."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


@contextmanager
def seeded(seed: int, replica: int) -> Iterator[None]:
    """Run a block with the process's generators seeded, each replica's apart, then restore them.

    Seeds of single requests (`request_seed`) would cost vLLM a draw for each, and on a CPU chunked prefill.
    """
    with preserved_random_state():
        seed_everything(seed + 1_000_003 * replica)
        yield


def seed_everything(seed: int) -> None:
    """Seed the process's generators: torch's, NumPy's and Python's."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
