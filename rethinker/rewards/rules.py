"""What may be settled about when two answers are equal."""

from __future__ import annotations

from dataclasses import dataclass

from rethinker.config import RewardConfig


@dataclass(frozen=True)
class Rules:
    """How far a right answer may be from the expected one: the settings `reward.rounding`, `percent`, `degrees`."""

    rounding: float = RewardConfig.rounding
    percent: bool = RewardConfig.percent
    degrees: bool = RewardConfig.degrees


DEFAULT_RULES = Rules()


def rules_of(config: RewardConfig) -> Rules:
    """The rules that the settings name."""
    return Rules(config.rounding, config.percent, config.degrees)
