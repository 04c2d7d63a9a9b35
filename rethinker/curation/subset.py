"""The questions that a model answers sometimes, balanced by category. Pure functions of the measured pass rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rethinker.data.subsets import hash_fraction


@dataclass(frozen=True)
class PassRate:
    """What a model made of one question."""

    query_id: str
    category: str
    right: int = 0
    """Responses with a reward of at least 1."""
    samples: int = 0
    """0 for a question that was left out."""
    tokens: float = 0.0
    """Mean length of its responses, in tokens that were sampled."""
    left_out: str | None = None
    """The limit that the question exceeds, as in training."""

    @property
    def rate(self) -> float:
        """Share of right responses; -1 where it was not measured, as in ViRL39K."""
        return self.right / self.samples if self.samples else -1.0

    @property
    def sometimes(self) -> bool:
        """0 < pass rate < 1: a group of responses to it can have an advantage."""
        return 0 < self.right < self.samples


def choose(rates: Sequence[PassRate], size: int | None = None) -> list[int]:
    """Which questions to train on, as indices in their order.

    Of those with 0 < pass rate < 1, every category gives an equal share; one that has fewer gives all, and the others
    share what it leaves. Within a category it is the lowest hashes of the ids: at random, and the same every time.

    Args:
        rates: of all questions.
        size: how many; None, or more than there are, takes all.
    """
    members: dict[str, list[int]] = {}
    for i, rate in enumerate(rates):
        if rate.sometimes:
            members.setdefault(rate.category, []).append(i)
    quotas = fill({category: len(own) for category, own in members.items()}, size)
    chosen: list[int] = []
    for category, own in members.items():
        chosen += sorted(own, key=lambda i: hash_fraction(rates[i].query_id))[: quotas[category]]
    return sorted(chosen)


def fill(available: dict[str, int], size: int | None) -> dict[str, int]:
    """Equal shares of `size`, none above what is available: the smallest categories first, the rest shared anew."""
    left = sum(available.values()) if size is None else size
    quotas = {}
    order = sorted(available, key=lambda category: (available[category], category))
    for place, category in enumerate(order):
        quotas[category] = min(available[category], left // (len(order) - place))
        left -= quotas[category]
    return quotas
