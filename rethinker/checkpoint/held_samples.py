"""Groups and samples as plain values, so that a resumed run trains on the very responses that a killed one held.

What all ranks know of a response (`outline`) is written once; its tokens and log-probs (`payload`) by the rank that
holds them. On another number of ranks, rank r takes over what the ranks r, r + world_size, ... held.
Legend: n responses, T tokens of all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from rethinker.runtime.distributed import Ranks
from rethinker.samples import Completion, Group, Query, RemoteCompletion, Rethinking, Rethought, Sample

Key = tuple[int, int]  # (group, index)


class Responses:
    """The queries and completions that restored groups and samples refer to.

    Args:
        queries: of the data, by id.
        payloads: what the ranks whose responses fall to this one had written.
        ranks: this process's place.
    """

    def __init__(self, queries: Mapping[str, Query], payloads: Iterable[dict[str, Any]], ranks: Ranks) -> None:
        self._queries, self._world_size, self._rank = queries, ranks.world_size, ranks.rank
        self._held: dict[Key, Completion] = {}
        for payload in payloads:
            self._held |= _completions(payload)

    def group(self, outline: dict[str, Any]) -> Group:
        """The group of an outline."""
        fields = dict(outline)
        number, owner = fields["number"], fields.pop("owner") % self._world_size
        completions = [self._completion((number, i), owner, known) for i, known in enumerate(fields.pop("completions"))]
        rethinking = Rethinking(**fields.pop("rethinking"))
        query = self._queries[fields.pop("query")]
        return Group(query, completions, rethinking=rethinking, owner=owner, **fields)

    def sample(self, outline: dict[str, Any]) -> Sample:
        """The sample of an outline."""
        fields = dict(outline)
        owner, query = fields.pop("owner") % self._world_size, self._queries[fields.pop("query")]
        completion = self._completion((fields["group"], fields["index"]), owner, fields.pop("completion"))
        return Sample(query, completion, owner=owner, **fields)

    def _completion(self, key: Key, owner: int, known: list[Any]) -> Completion | RemoteCompletion:
        return self._held[key] if owner == self._rank else RemoteCompletion(*known)


def group_outline(group: Group) -> dict[str, Any]:
    """All of a group but its responses' tokens."""
    fields = {field.name: getattr(group, field.name) for field in dataclasses.fields(group)}
    return fields | {
        "query": group.query.id,
        "completions": [_known(completion) for completion in group.completions],
        "rethinking": dataclasses.asdict(group.rethinking),
    }


def sample_outline(sample: Sample) -> dict[str, Any]:
    """All of a sample but its response's tokens."""
    fields = {field.name: getattr(sample, field.name) for field in dataclasses.fields(sample)}
    return fields | {"query": sample.query.id, "completion": _known(sample.completion)}


def _known(completion: Completion | RemoteCompletion) -> list[Any]:
    return [completion.tokens, completion.trainable_tokens, completion.supervised]


def payload(groups: Iterable[Group], samples: Iterable[Sample]) -> dict[str, Any]:
    """The responses that this rank holds of some groups and samples, each once."""
    held: dict[Key, Completion] = {}
    for group in groups:
        held |= {(group.number, i): c for i, c in enumerate(group.completions) if isinstance(c, Completion)}
    held |= {(s.group, s.index): s.completion for s in samples if isinstance(s.completion, Completion)}
    completions = list(held.values())
    scored = [c.trainer_logprobs for c in completions if c.trainer_logprobs is not None]
    return {
        "keys": torch.tensor(list(held), dtype=torch.int64).view(-1, 2),  # [n, 2]
        "lengths": torch.tensor([c.tokens for c in completions], dtype=torch.int64),  # [n]
        "token_ids": _joined([c.token_ids for c in completions], np.int32),  # [T]
        "logprobs": _joined([c.logprobs for c in completions], np.float32),  # [T]
        "scored": [c.trainer_logprobs is not None for c in completions],
        "trainer_logprobs": _joined(scored, np.float32),
        "texts": [c.text for c in completions],
        "finish_reasons": [c.finish_reason for c in completions],
        "rethought": [c.rethought and dataclasses.asdict(c.rethought) for c in completions],
    }


def _joined(arrays: list[np.ndarray], dtype: type) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype), *arrays]))


def _completions(payload: dict[str, Any]) -> dict[Key, Completion]:
    held: dict[Key, Completion] = {}
    start = scored = 0  # where the next response's tokens and trainer's log-probs begin
    for i, (key, length) in enumerate(zip(payload["keys"].tolist(), payload["lengths"].tolist(), strict=True)):
        rethought, end = payload["rethought"][i], start + length
        held[key[0], key[1]] = Completion(
            # Copies: one response that is kept would keep them all.
            token_ids=payload["token_ids"][start:end].int().numpy().copy(),
            logprobs=payload["logprobs"][start:end].float().numpy().copy(),
            text=payload["texts"][i],
            finish_reason=payload["finish_reasons"][i],
            rethought=rethought and Rethought(**rethought),
        )
        if payload["scored"][i]:
            held[key[0], key[1]].trainer_logprobs = (
                payload["trainer_logprobs"][scored : scored + length].float().numpy().copy()
            )
            scored += length
        start = end
    return held
