"""The slow environment of the benchmark says what the other says, and a tenth of its answers take a second."""

from __future__ import annotations

from benchmarks import slow_tools
from rethinker.samples import Query


def test_a_tenth_of_the_answers_is_late(monkeypatch):
    """Of the same turns always the same, so that both kinds of rollouts sample alike."""
    slept: list[float] = []
    monkeypatch.setattr(slow_tools.time, "sleep", slept.append)
    late = []
    for _ in range(2):
        for number in range(400):
            state, other = ({"query": Query(f"q{number}", "", "")} for _ in range(2))
            for turn in range(slow_tools.TURNS):
                before = len(slept)
                answer = slow_tools.slow(state, f"turn {turn}")
                assert answer == slow_tools.at_once(other, f"turn {turn}")
                assert answer.done == (turn == slow_tools.TURNS - 1)
                late.append(len(slept) > before)
    half = len(late) // 2
    assert late[:half] == late[half:] and set(slept) == {slow_tools.SECONDS}
    assert 0.07 < sum(late) / len(late) < 0.13
