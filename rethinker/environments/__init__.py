"""What answers the policy between its turns: tools, and environments of the user's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass
class Observation:
    """What an environment answers to a turn."""

    text: str = ""
    images: Sequence[Any] = ()
    done: bool = False
    reward: float = 0.0
    role: Literal["user", "assistant"] = "user"
    calls: int = 0
    failures: tuple[str, ...] = ()
