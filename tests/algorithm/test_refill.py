"""Which groups an episode keeps, and how many more it samples."""

from __future__ import annotations

import pytest

from rethinker.algorithm.refill import fill, next_round
from rethinker.samples import Group, Query


def rewarded(*effective: int) -> list[Group]:
    """Groups in the order of sampling: 1 with rewards that differ, 0 with equal ones."""
    return [
        Group(Query(f"q{i}", "?", "1"), [], 0, rewards=[0.0, float(differs)], number=i)
        for i, differs in enumerate(effective)
    ]


@pytest.mark.parametrize(
    ("effective", "wanted", "more"),
    [
        ([1, 1, 1, 1], 4, 0),
        ([1, 1, 1, 0], 4, 2),  # 1 / (3/4), rounded up
        ([1, 1, 0, 0], 4, 4),  # 2 / (1/2)
        ([1, 0, 0, 0], 4, 4),  # 12, but never more than the episode
        ([0, 0, 0, 0], 4, 4),  # nothing is known of the share
        ([1, 0, 0, 0, 1, 1, 0, 0], 4, 3),  # over all rounds so far: 1 / (3/8)
        ([1, 1, 1, 1, 1, 0], 4, 0),
    ],
)
def test_a_round_asks_for_what_is_missing(effective, wanted, more):
    """The missing ones divided by the share that was effective, rounded up, and at most the episode's size."""
    assert next_round(rewarded(*effective), wanted) == more


def test_a_group_that_is_masked_whole_is_not_effective():
    """With train.mask_truncated a group of truncated responses trains nothing: another is sampled in its place."""
    groups = rewarded(1, 1)
    groups[0].truncated, groups[1].truncated = [True, True], [True, False]
    assert (next_round(groups, 2), next_round(groups, 2, mask_truncated=True)) == (0, 2)
    assert fill(groups, 1)[0] == groups[:1] and fill(groups, 1, mask_truncated=True)[0] == groups[1:]


@pytest.mark.parametrize(
    ("effective", "wanted", "kept"),
    [
        ([1, 0, 1, 1], 3, [0, 2, 3]),
        ([0, 1, 1, 1, 1], 3, [1, 2, 3]),  # the last one was not needed
        ([0, 0, 1, 0, 1], 4, [0, 1, 2, 4]),  # filled up, in the order of sampling
        ([0, 0, 0], 3, [0, 1, 2]),
    ],
)
def test_effective_groups_are_kept_and_others_fill_up(effective, wanted, kept):
    """An episode has as many groups as wanted; kept and dropped ones together are all, each in its order."""
    groups, dropped = fill(rewarded(*effective), wanted)
    assert [group.number for group in groups] == kept
    assert [group.number for group in dropped] == [i for i in range(len(effective)) if i not in kept]
