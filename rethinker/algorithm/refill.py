"""Refill: queries whose responses all have one reward make room for others.

DAPO calls it dynamic sampling (arXiv 2503.14476, section 3.2).
"""

from __future__ import annotations

from rethinker.algorithm.selection import teaches
from rethinker.samples import Group


def next_round(groups: list[Group], wanted: int, mask_truncated: bool = False) -> int:
    """How many queries to sample after `groups`, so that about `wanted` effective ones are there; 0: they are.

    Those still missing, divided by the share that was effective so far, rounded up; at most `wanted`, and `wanted`
    where none was. A group that `mask_truncated` leaves without a response is not effective. It depends on the rewards
    alone: on any number of ranks the same number of queries is asked.
    """
    effective = sum(teaches(group, mask_truncated) for group in groups)
    missing = max(0, wanted - effective)
    return min(wanted, -(-missing * len(groups) // effective)) if effective else wanted


def fill(groups: list[Group], wanted: int, mask_truncated: bool = False) -> tuple[list[Group], list[Group]]:
    """The `wanted` groups to train on, and the dropped ones, both in the order of sampling.

    Effective ones are kept, the first ones where there are more; where there are fewer, the first ones without an
    advantage fill up.
    """
    places = sorted(range(len(groups)), key=lambda place: not teaches(groups[place], mask_truncated))  # stable
    return [groups[i] for i in sorted(places[:wanted])], [groups[i] for i in sorted(places[wanted:])]
