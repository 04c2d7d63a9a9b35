"""Which rank holds which response: the one that sampled it, until a sample is trained.

After a rollout all ranks learn every response's length and reward, so that all choose the same batches; its tokens and
log-probs stay where they were sampled. They travel when a step trains them on another rank, all in one collective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rethinker.runtime.distributed import Ranks
from rethinker.samples import Bundle, Completion, Group, Query, RemoteCompletion, Sample


def share(mine: list[Group], queries: Sequence[Query], first_number: int, ranks: Ranks) -> list[Group]:
    """The episode's groups in the order of its queries, on every rank: its own whole, those of others in outline.

    `mine` are this rank's, with rewards: of queries[rank::world_size]. The queries, the same everywhere, are not sent.
    """

    def outline(group: Group) -> Group:
        known = [RemoteCompletion(c.tokens, c.trainable_tokens, c.supervised) for c in group.completions]
        return replace(group, query=None, completions=known)

    outlines = ranks.gather(list(map(outline, mine)))
    groups = []
    for i, query in enumerate(queries):
        owner, place = i % ranks.world_size, i // ranks.world_size
        group = mine[place] if owner == ranks.rank else replace(outlines[owner][place], query=query)
        groups.append(replace(group, number=first_number + i, owner=owner))
    return groups


def collect(groups: list[Group], ranks: Ranks) -> list[Group]:
    """The groups on rank 0, every one of them whole; on other ranks as they are."""
    if ranks.world_size == 1:
        return groups
    mine = {group.number: group.completions for group in groups if group.owner == ranks.rank}
    held = ranks.gather_to_main(mine)
    if held is None:
        return groups
    completions = {number: responses for share in held for number, responses in share.items()}
    return [replace(group, completions=completions[group.number]) for group in groups]


def fetch(plan: list[list[list[Bundle]]], ranks: Ranks) -> list[list[Bundle]]:
    """This rank's part, [micro-batch][bundle], of a plan, [rank][micro-batch][bundle], the same on every rank: with
    every sample's tokens and log-probs, in one collective (none if all are home)."""
    travelling: dict[tuple[int, int], Sample] = {}
    for rank, micro_batches in enumerate(plan):
        samples = (sample for bundles in micro_batches for bundle in bundles for sample in bundle.samples)
        travelling |= {(s.group, s.index): s for s in samples if s.owner != rank}
    arrived: dict[tuple[int, int], Completion] = {}
    if travelling:  # on every rank alike
        for held in ranks.gather({k: s.completion for k, s in travelling.items() if s.owner == ranks.rank}):
            arrived |= held

    def whole(sample: Sample) -> Sample:
        if sample.owner == ranks.rank:
            return sample
        completion = arrived[sample.group, sample.index]
        assert completion.tokens == sample.completion.tokens, f"two responses are called {sample.group}, {sample.index}"
        return replace(sample, completion=completion)

    return [
        [replace(bundle, samples=tuple(map(whole, bundle.samples))) for bundle in bundles]
        for bundles in plan[ranks.rank]
    ]
