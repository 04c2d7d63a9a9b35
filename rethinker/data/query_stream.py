"""The order in which training meets the questions: endless, seeded, its state a few numbers."""

from __future__ import annotations

import copy
import hashlib
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch

from rethinker.config import ConfigError
from rethinker.data.draw import Draw
from rethinker.data.mixture import category_of, check_category_weights
from rethinker.samples import Group, Query


def fingerprint(queries: Iterable[Query]) -> str:
    """SHA-256 of the questions' ids, texts and answers, in order."""
    digest = hashlib.sha256()
    for query in queries:
        digest.update(repr((query.id, query.question, query.answer, len(query.images))).encode())
    return digest.hexdigest()


class QueryStream:
    """An endless, seeded order of the queries; its state is a few numbers.

    Every epoch is its own permutation, a function of (seed, epoch). With `category_weights` the categories take turns
    in those shares, each running through its own permutations; categories without a weight are left out.

    Args:
        queries: the questions; None in a place that is passed over.
        seed: of the permutations.
        category_weights: share of each `metadata["category"]`, in any scale; empty keeps the data's own mix.
        label: what the weights are about instead, as `mixture.stream_weights` gives it.
        members: the places of each label, where they are known without a look at the queries.
        draw: which queries come before their turn, within the label whose turn it is; None: each comes in its turn.

    Raises:
        ConfigError: no queries, or weights that name no category of theirs.
    """

    def __init__(
        self,
        queries: Sequence[Query | None],
        *,
        seed: int,
        category_weights: Mapping[str, float] | None = None,
        label: Callable[[Query], str] = category_of,
        members: Mapping[str, Sequence[int]] | None = None,
        draw: Draw | None = None,
    ) -> None:
        if not queries:
            raise ConfigError("data.train: there are no queries to train on")
        self.queries, self.seed = queries, seed
        weights = {name: float(weight) for name, weight in (category_weights or {}).items()}
        if weights:
            members = members or _places(queries, label)
            check_category_weights(weights, members, "data.category_weights")
            self._members = {name: members[name] for name, weight in weights.items() if weight > 0}
        else:
            self._members = {"": range(len(queries))}
        total = sum(weights.values())
        self._shares = {name: weights[name] / total if weights else 1.0 for name in self._members}
        self._drawn = dict.fromkeys(self._members, 0)
        self._walked = dict.fromkeys(self._members, 0)  # places of each label's order; without a draw they are the same
        self._draw = draw
        self._orders: dict[str, tuple[int, np.ndarray]] = {}

    def __len__(self) -> int:
        """Queries in the order: all of them, or those of the weighted categories."""
        return sum(map(len, self._members.values()))

    def fingerprint(self) -> str:
        """SHA-256 of the questions' ids, texts and answers, in the data's order."""
        return fingerprint(self.queries)

    def keep(self, queries: Iterable[Query]) -> dict[str, int] | None:
        """What a checkpoint must hold of the queries that held samples refer to: nothing, the data has them."""

    def kept(self, state: dict[str, int] | None) -> dict[str, Query]:
        """The queries by id, of what `keep` gave."""
        return {query.id: query for query in self.queries}

    def next(self, n: int) -> list[Query]:
        """The next n queries; n may exceed the number of queries."""
        drawn = map(self.queries.__getitem__, iter(self._next_place, None))
        return list(islice(filter(None, drawn), n))

    def peek(self, n: int) -> list[Query]:
        """The next n queries, which stay the next ones."""
        position = dict(self._drawn), dict(self._walked), copy.deepcopy(self._draw)
        queries = self.next(n)
        self._drawn, self._walked, self._draw = position
        return queries

    def leave_out(self, query: Query) -> None:
        """Draw a query that cannot be asked no more before its turn."""
        if self._draw:
            self._draw.leave_out(query)

    def end_episode(self, groups: Iterable[Group]) -> None:
        """Take note of all groups that an episode sampled, with rewards: the next draws go by them."""
        if self._draw:
            self._draw.end_episode(groups)

    def _next_place(self) -> int:
        turn = sum(self._drawn.values()) + 1  # the label furthest behind: exact shares in every stretch of the order
        name = max(self._shares, key=lambda name: self._shares[name] * turn - self._drawn[name])
        members, number = self._members[name], self._drawn[name]
        self._drawn[name] += 1
        in_order = partial(self._next_in_order, name)
        return members[self._draw.next(name, members, number, turn, in_order) if self._draw else in_order()]

    def _next_in_order(self, name: str) -> int:
        """The next place of a label's permutations, among its members."""
        size = len(self._members[name])
        epoch, place = divmod(self._walked[name], size)
        if name not in self._orders or self._orders[name][0] != epoch:
            generator = np.random.default_rng([self.seed, epoch, zlib.crc32(name.encode())])
            self._orders[name] = epoch, generator.permutation(size)
        self._walked[name] += 1
        return int(self._orders[name][1][place])

    def state_dict(self) -> dict[str, Any]:
        """Where the order stands between two episodes: the queries drawn of each category, and what draws go by."""
        state = {"seed": self.seed, "sizes": {c: len(m) for c, m in self._members.items()}, "drawn": dict(self._drawn)}
        if self._draw:
            state |= {"walked": dict(self._walked), "weights": torch.from_numpy(self._draw.weights.copy())}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken.

        Raises:
            ConfigError: the state belongs to another seed or to other data.
        """
        here = self.state_dict()
        for key, setting in (("seed", "seed"), ("sizes", "data.train")):
            if state.get(key) != here[key]:
                raise ConfigError(
                    f"{setting}: the checkpoint's data order has {key} {state.get(key)}, this run {here[key]}"
                )
        self._drawn = dict(state["drawn"])
        self._walked = dict(state.get("walked", self._drawn))
        if self._draw and "weights" in state:  # an older release had none
            self._draw.restart(state["weights"].numpy().copy())
        # Of labels equally far behind the first one comes, and settings may list them in another order now.
        self._shares = {name: self._shares[name] for name in self._drawn}


def _places(queries: Sequence[Query], label: Callable[[Query], str]) -> dict[str, list[int]]:
    members: dict[str, list[int]] = {}
    for i, query in enumerate(queries):
        members.setdefault(label(query), []).append(i)
    return members
