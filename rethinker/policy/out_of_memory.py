"""A micro-batch that does not fit into memory: a clear error, and a smaller budget for the next start.

A step cannot be repeated in place: where one rank fails, the others wait in an all-gather that it will never reach, and
ZeRO-3 holds half a pass. So the rank writes the smaller budget into the run's folder and ends; the next start reads it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from rethinker.config import ConfigError
from rethinker.runtime.files import whole_file
from rethinker.samples import Bundle

Plan = list[list[list[Bundle]]]  # [rank][micro-batch][bundle]
_MESSAGES = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")  # from libraries with allocators of their own


class OutOfMemory(RuntimeError):
    """Memory ran out; the message names what the next start will do, or what to set."""


@contextmanager
def explained(advice: Callable[[], str]) -> Iterator[None]:
    """Turn a library's error that the device's memory is full into OutOfMemory(advice())."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not any(text in str(error) for text in _MESSAGES):
            raise
        raise OutOfMemory(advice()) from error


def smaller_budget(budget: int, plan: Plan) -> int:
    """Half the budget, or half of what was really used of it; at least room for the longest response.

    Args:
        budget: train.micro_batch_tokens in force, tokens.
        plan: the micro-batches that did not fit.

    Raises:
        ConfigError: a single response with its prompt is the fullest micro-batch, and no budget makes it smaller.
    """
    micro_batches = [bundles for rank in plan for bundles in rank]
    fullest = max((sum(bundle.tokens for bundle in bundles) for bundles in micro_batches), default=0)
    samples = [sample for bundles in micro_batches for bundle in bundles for sample in bundle.samples]
    longest = max((sample.prompt_tokens + sample.input_tokens for sample in samples), default=0)
    fits = max(1, min(budget, fullest) // 2, longest)
    if fits >= fullest:
        raise ConfigError(
            f"out of memory with one response of {fullest} tokens (prompt included) in a micro-batch, and no smaller "
            f"train.micro_batch_tokens (now {budget}) divides that; set policy.gradient_checkpointing=true, or lower "
            "rollout.gpu_memory_utilization, rollout.max_new_tokens or data.max_pixels"
        )
    return fits


def reduce_budget(file: Path | None, setting: int, budget: int, plan: Plan) -> str:
    """Note a smaller budget for the next start, whole or not at all; returns what was done, or is to be done without a
    file.

    Args:
        setting: train.micro_batch_tokens, which the note replaces.
        budget, plan: as for `smaller_budget`.
    """
    smaller = smaller_budget(budget, plan)
    change = f"train.micro_batch_tokens={budget} is reduced to {smaller}"
    if file is None:
        return f"{change}; set train.micro_batch_tokens={smaller} and start again"
    with whole_file(file) as partial:
        partial.write_text(json.dumps({"train.micro_batch_tokens": setting, "reduced_to": smaller}) + "\n")
    return f"{change}; {file} says so to the next start of this run (torchrun --max-restarts makes one)"


def noted_budget(file: Path | None, setting: int) -> int:
    """The noted budget; `setting` itself without a note, or if the note was made under another setting."""
    if file is None or not file.is_file():
        return setting
    note = json.loads(file.read_text())
    return note["reduced_to"] if note["train.micro_batch_tokens"] == setting else setting
