"""Which questions curation chooses: those answered sometimes, categories in equal shares, the same ones every time."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from rethinker.curation.subset import PassRate, choose, fill


def made(counts: dict[str, int], right: int = 3) -> list[PassRate]:
    return [PassRate(f"{category}{i}", category, right, 8) for category, n in counts.items() for i in range(n)]


def test_only_questions_answered_sometimes():
    """Never right, always right and left out: not chosen, however many are asked for."""
    rates = [PassRate(str(k), "a", k, 8) for k in range(9)] + [PassRate("x", "a", 0, 0, left_out="data.max_images")]
    assert choose(rates) == choose(rates, 100) == list(range(1, 8))
    assert [rate.rate for rate in rates] == [k / 8 for k in range(9)] + [-1.0]


def test_categories_have_equal_shares():
    """10 of each where there is enough; what a small category lacks goes to the others in equal parts."""
    rates = made({"many": 1000, "some": 30, "few": 4})
    chosen = Counter(rates[i].category for i in choose(rates, 30))
    assert chosen == {"many": 13, "some": 13, "few": 4}
    assert Counter(rates[i].category for i in choose(rates, 100)) == {"many": 66, "some": 30, "few": 4}


@settings(max_examples=300)
@given(st.dictionaries(st.text(max_size=3), st.integers(0, 50), max_size=8), st.integers(1, 200))
def test_shares_fill_the_size(available, size):
    """As many as asked for or available; no category gets less than another unless it has no more (by one at most)."""
    quotas = fill(available, size)
    assert sum(quotas.values()) == min(size, sum(available.values()))
    assert all(0 <= quotas[c] <= n for c, n in available.items())
    largest = max(quotas.values(), default=0)
    assert all(quotas[c] >= largest - 1 for c, n in available.items() if quotas[c] < n)


def test_the_choice_is_stable():
    """It depends on no order and no seed, and a larger subset holds the smaller one."""
    rates = made({"a": 300, "b": 200})
    chosen = {rates[i].query_id for i in choose(rates, 50)}
    assert {rates[::-1][i].query_id for i in choose(rates[::-1], 50)} == chosen
    assert chosen < {rates[i].query_id for i in choose(rates, 90)}
    assert choose(rates, 50) == sorted(choose(rates, 50)) != list(range(25)) + list(range(300, 325))
