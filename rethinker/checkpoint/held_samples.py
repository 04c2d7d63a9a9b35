"""The samples of a checkpoint: a resumed run trains on the very responses that the stopped one held.

A group or a sample itself is written as what all ranks know of it (resume.py); the tokens and log-probs of its
responses are written by the rank that holds them (`held_responses`). On another number of ranks, rank r takes over what
the ranks r, r + world_size, ... held.
Legend: n responses, T tokens of all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import starmap
from typing import Any

import numpy as np
import torch

from rethinker.runtime.distributed import Ranks
from rethinker.samples import Completion, Group, Observed, Query, RemoteCompletion, Rethinking, Rethought, Sample

Key = tuple[int, int]  # (group, index)


def held_responses(groups: Iterable[Group], samples: Iterable[Sample]) -> dict[str, Any]:
    """The responses that this rank holds of some groups and samples, each once."""
    held: dict[Key, Completion] = {}
    for group in groups:
        held |= {(group.number, i): c for i, c in enumerate(group.completions) if isinstance(c, Completion)}
    held |= {(s.group, s.index): s.completion for s in samples if isinstance(s.completion, Completion)}
    completions = list(held.values())
    return {
        "keys": torch.tensor(list(held), dtype=torch.int64).view(-1, 2),  # [n, 2]
        "lengths": torch.tensor([c.tokens for c in completions], dtype=torch.int64),  # [n]
        "token_ids": _joined([c.token_ids for c in completions], np.int32),  # [T]
        "logprobs": _joined([c.logprobs for c in completions], np.float32),  # [T]
        "scored": [c.trainer_logprobs is not None for c in completions],
        "trainer_logprobs": _joined([c.trainer_logprobs for c in completions], np.float32),  # [T of the scored ones]
        "ranked": [c.kept is not None for c in completions],
        "kept": _joined([c.kept for c in completions], np.bool_),  # [T of the ranked ones]
        "experts": [None if c.experts is None else torch.from_numpy(c.experts) for c in completions],
        "texts": [c.text for c in completions],
        "finish_reasons": [c.finish_reason for c in completions],
        "rethought": [c.rethought for c in completions],
        "observed": [[replace(part, images=()) for part in c.observed] for c in completions],
        "observed_images": [
            [
                [torch.frombuffer(bytearray(image["bytes"]), dtype=torch.uint8) for image in part.images]
                for part in c.observed
            ]
            for c in completions
        ],
    }


def _joined(arrays: list[np.ndarray | None], dtype: type) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype), *(a for a in arrays if a is not None)]))


class Responses:
    """The queries (by id) and completions that restored groups and samples refer to; `saved` are `held_responses` of
    the ranks whose responses fall to this one."""

    def __init__(self, queries: Mapping[str, Query], saved: Iterable[dict[str, Any]], ranks: Ranks) -> None:
        self._queries, self._ranks = queries, ranks
        self._held: dict[Key, Completion] = {}
        for state in saved:
            self._held |= _completions(state)

    def group(self, saved: dict[str, Any]) -> Group:
        """The group that was written as `saved`."""
        known = self._known(saved) | {"rethinking": Rethinking(**saved["rethinking"])}
        places = [(saved["number"], i) for i in range(len(saved["completions"]))]
        responses = [self._response(*of, known["owner"]) for of in zip(places, saved["completions"], strict=True)]
        return Group(**known | {"completions": responses})

    def sample(self, saved: dict[str, Any]) -> Sample:
        """The sample that was written as `saved`."""
        known = self._known(saved)
        response = self._response((saved["group"], saved["index"]), saved["completion"], known["owner"])
        return Sample(**known | {"completion": response})

    def _known(self, saved: dict[str, Any]) -> dict[str, Any]:
        return saved | {"query": self._queries[saved["query"]], "owner": saved["owner"] % self._ranks.world_size}

    def _response(self, key: Key, lengths: list[Any], owner: int) -> Completion | RemoteCompletion:
        return self._held[key] if owner == self._ranks.rank else RemoteCompletion(*lengths)


def _completions(saved: dict[str, Any]) -> dict[Key, Completion]:
    lengths = saved["lengths"].tolist()
    token_ids, logprobs = (saved[name].split(lengths) for name in ("token_ids", "logprobs"))
    scored = [length for length, is_scored in zip(lengths, saved["scored"], strict=True) if is_scored]
    scores = iter(saved["trainer_logprobs"].split(scored))
    ranked = saved.get("ranked", [False] * len(lengths))  # an older release ranked no tokens
    of_ranked = [length for length, is_ranked in zip(lengths, ranked, strict=True) if is_ranked]
    kept = iter(saved["kept"].split(of_ranked)) if of_ranked else None
    experts = saved.get("experts", [None] * len(lengths))
    observed = saved.get("observed", [[]] * len(lengths))
    shown = saved.get("observed_images", observed)
    return {
        (group, index): Completion(
            # Copies: one response that is kept would keep them all. An older release wrote int64 and fp64.
            np.array(token_ids[i], np.int32),
            np.array(logprobs[i], np.float32),
            saved["texts"][i],
            saved["finish_reasons"][i],
            saved["rethought"][i] and Rethought(**saved["rethought"][i]),
            np.array(next(scores), np.float32) if saved["scored"][i] else None,
            np.array(next(kept), bool) if ranked[i] else None,
            None if experts[i] is None else np.array(experts[i]),
            tuple(starmap(_observed, zip(observed[i], shown[i], strict=True))),
        )
        for i, (group, index) in enumerate(saved["keys"].tolist())
    }


def _observed(saved: dict[str, Any], images: list[torch.Tensor]) -> Observed:
    shown = tuple({"bytes": image.numpy().tobytes()} for image in images)
    return Observed(**saved | {"images": shown, "failures": tuple(saved["failures"])})
