"""The verdict on what a box holds, for tests."""

from __future__ import annotations

from rethinker.rewards.answers import compare, math_equal
from rethinker.rewards.functions import context_of
from rethinker.samples import Query


def answers_match(predicted: str, answer: str, query: Query | None = None) -> bool:
    """The verdict on what a box holds, mathematics included."""
    question, choices = context_of(query or Query("q", "", answer))
    return bool(compare(predicted, answer, question=question, choices=choices, equal=math_equal))
