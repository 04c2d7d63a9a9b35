from __future__ import annotations

import pytest

from rethinker.samples import Query


@pytest.fixture
def query():
    """Builds a query from its question and answer."""

    def build(question: str = "?", answer: str = "", **metadata) -> Query:
        return Query(id="q", question=question, answer=answer, metadata=metadata)

    return build
