"""The learning rate over a run."""

from __future__ import annotations

import math

from rethinker.config import Config


def learning_rate(step: int, total_steps: int, config: Config) -> float:
    """The learning rate of optimizer step `step` (from 0): linear warm-up, then train.schedule."""
    train = config.train
    warmup = round(train.warmup_ratio * total_steps)
    if step < warmup:
        return train.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total_steps - warmup)
    shape = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    floor = train.min_lr_ratio
    return train.learning_rate * (floor + (1 - floor) * shape[train.schedule])
