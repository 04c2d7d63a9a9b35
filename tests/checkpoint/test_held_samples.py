"""Groups and samples in a checkpoint: every rank gets back what it held, on as many ranks as before or on others."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from rethinker.checkpoint.held_samples import Responses, held_responses
from rethinker.checkpoint.resume import frozen, read_state
from rethinker.runtime.distributed import ALONE, Ranks
from rethinker.samples import Completion, Group, Observed, Query, RemoteCompletion, Rethinking, Rethought

QUERIES = {name: Query(name, f"what is {name}?", name, (f"{name}.png",), {"category": "x"}) for name in "abcd"}


def response(number: int, index: int) -> Completion:
    if number == 1 and index == 0:  # a rethought and scored one
        spans = Rethought(1, 2, "doubt", 1, 2)
        numbers = {"trainer_logprobs": [-0.1, -0.2, -1e-300], "kept": [True, True, False]}
        numbers |= {"experts": np.arange(19 * 2 * 3, dtype=np.uint8).reshape(19, 2, 3)}
        return Completion([7, 8, 9], [-0.5, math.nan, -1 / 3], "é Wait \U0001f600", "stop", spans, **numbers)
    if number == 2 and index == 1:  # of three turns
        answers = (
            Observed(1, 3, 4, "look: <image>", ({"bytes": b"\x00PNG\xff"},), 0.5, 2, ("box",)),
            Observed(4, 6, 9, "<image><image>", ({"bytes": b"a"}, {"bytes": b"b"})),
            Observed(7, 7, 12, failures=("turns",)),
        )
        logprobs = [-1.0, math.nan, math.nan, -2.0, math.nan, math.nan, -3.0]
        return Completion([5, 6, 7, 8, 9, 10, 11], logprobs, "one, two, end", "stop", observed=answers)
    return Completion([10 * number + index] * index, [-(0.1 + number)] * index, f"{number}/{index}", "length")


def groups_on(rank: int, world_size: int) -> list[Group]:
    """Four groups of three responses as one of the ranks holds them."""
    made = []
    for number, query in enumerate(QUERIES.values()):
        owner = number % world_size
        responses = [response(number, index) for index in range(3)]
        if owner != rank:
            responses = [RemoteCompletion(c.tokens, c.trainable_tokens, c.supervised) for c in responses]
        known = {"rewards": [1.0, 0.0, 1.0], "advantages": [0.7, -1.4, 0.7], "rethinks": [True, False, False]}
        known |= {"fast": [False, True, False], "nlls": [1 / 3, 0.0, math.inf]}
        known |= {"truncated": [False, False, True]}
        known |= {"scores": {"boxed": [1.0, 0.0, 1.0], "format": [1 / 3, -1e-300, 0.1 * number]}}
        known |= {"rethinking": Rethinking(3, 1, 1, 0), "sampled_tokens": 99}
        made.append(Group(query, responses, 5, prompt_tokens=17, number=number, owner=owner, **known))
    return made


def test_numbers_of_an_older_release_are_read(tmp_path):
    """It wrote ids as int64 and log-probs as fp64: the very completions come back."""
    held = held_responses(groups_on(0, 1), [])
    wide = held | {"token_ids": held["token_ids"].long()}
    wide |= {name: held[name].double() for name in ("logprobs", "trainer_logprobs")}
    frozen([[held, wide], groups_on(0, 1)])(tmp_path / "run")
    saved, outlines = read_state(tmp_path / "run")
    for state in saved:
        responses = Responses(QUERIES, [state], ALONE)
        assert [responses.group(outline) for outline in outlines] == groups_on(0, 1)


@pytest.mark.parametrize("before, after", [(1, 1), (2, 2), (2, 1), (1, 2), (3, 2), (2, 3)])
def test_every_rank_holds_what_it_should(tmp_path, before, after):
    """Rank r takes over what the ranks r, r + after, ... held, to the bit; of the rest it has outlines."""
    for rank in range(before):
        groups = groups_on(rank, before)
        samples = [sample for group in groups[:2] for sample in group.samples()]  # also in replay
        frozen(held_responses(groups, samples))(tmp_path / f"rank_{rank}")
        if rank == 0:
            frozen({"groups": groups, "samples": samples})(tmp_path / "run")
    saved = read_state(tmp_path / "run")
    for rank in range(after):
        owns = [read_state(tmp_path / f"rank_{old}") for old in range(rank, before, after)]
        responses = Responses(QUERIES, owns, Ranks(rank, after, rank))
        groups = [responses.group(outline) for outline in saved["groups"]]
        for number, (group, whole) in enumerate(zip(groups, groups_on(0, 1), strict=True)):
            owner = number % before % after
            assert group.owner == owner and group.query is QUERIES["abcd"[number]]
            expected = [
                c if owner == rank else RemoteCompletion(c.tokens, c.trainable_tokens, c.supervised)
                for c in whole.completions
            ]
            assert group.completions == expected
            rest = {
                f.name: getattr(group, f.name)
                for f in dataclasses.fields(Group)
                if f.name not in ("completions", "owner")
            }
            assert rest == {name: getattr(whole, name) for name in rest}
        samples = [responses.sample(outline) for outline in saved["samples"]]
        assert repr(samples) == repr([sample for group in groups[:2] for sample in group.samples()])
