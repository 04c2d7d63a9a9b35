"""What may be settled about when two answers are equal; the defaults are those of the field's graders."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rules:
    """How far a right answer may be from the expected one.

    `rounding`: a decimal equals a fraction or a root that it is the rounding of, if the relative distance is smaller; 0
    for exact ones only. `percent`: 60% equals 0.6. `degrees`: 30° equals pi/6.
    """

    rounding: float = 1e-4
    percent: bool = True
    degrees: bool = True


DEFAULT_RULES = Rules()
