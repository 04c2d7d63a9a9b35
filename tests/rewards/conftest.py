from __future__ import annotations

import pytest

from rethinker.config import RewardConfig
from rethinker.rewards.checker import AnswerChecker
from rethinker.samples import Query


@pytest.fixture(scope="session")
def boxed_checker():
    """The built-in check, in one worker."""
    with AnswerChecker(RewardConfig(timeout_s=2.0, workers=1)) as checker:
        yield checker


@pytest.fixture
def query():
    """Builds a query from its question and answer."""

    def build(question: str = "?", answer: str = "", **metadata) -> Query:
        return Query(id="q", question=question, answer=answer, metadata=metadata)

    return build
