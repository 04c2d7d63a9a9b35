"""The replay buffer of Selective Sample Replay: samples drawn in proportion to |advantage|^alpha, or by other rules.

The rules, with their sources, are in docs/how_it_works.md. The distribution is global: every rank holds the same tree
over all ranks' samples and draws from the same seed, so the draws agree without communication. The tokens of a sample
stay with the rank that owns it (runtime/ownership.py). The tree is on the host, which needs the drawn slots.
"""

from __future__ import annotations

import dataclasses
import decimal
import functools
import itertools
import math
from collections import Counter, deque
from collections.abc import Collection
from decimal import Decimal
from typing import Any

import torch

from rethinker.config import ConfigError, ReplayConfig
from rethinker.samples import Sample
from rethinker_kernels import SumTree

_DIGITS = decimal.Context(prec=28, traps=[])  # powers that are the same on every machine: ranks weigh alike


@dataclasses.dataclass(frozen=True)
class _Entry:
    """What one draw returns: a sample, or with replay.unit=group the effective samples of a query."""

    samples: list[Sample]
    added: int  # the number of the `add` it came with, from 0
    priority: float  # what the tree raises to its alpha


class ReplayBuffer:
    """Samples with |advantage| > 0, at most `capacity`; the oldest leave first. The seed is the same on every rank."""

    def __init__(self, config: ReplayConfig, seed: int) -> None:
        self._config = config
        self._by_correctness = config.priority == "correctness"
        # Where weights change from draw to draw, each draw weighs every entry again, and the tree takes that as it is.
        self._weighs_again = self._by_correctness or config.age_decay is not None
        self._tree = SumTree(config.capacity, alpha=1.0 if self._weighs_again else config.alpha)
        self._entries: dict[int, _Entry] = {}  # slot of the tree -> entry, oldest first
        self._free = deque(range(config.capacity))  # slots without an entry
        self._size = 0  # samples in all entries
        self._adds = 0
        self._generator = torch.Generator().manual_seed(seed)
        self.drawn_age_mean = 0.0
        """Of the last draw: how many `add`s (that is, training steps) ago its samples were fresh, on average."""

    def __len__(self) -> int:
        """Samples in the buffer, over all ranks."""
        return self._size

    def add(self, samples: list[Sample]) -> None:
        """Keep these samples, in order, but for those with zero advantage; with replay.unit=group those of one group
        (`Sample.group`), which stand together, become one entry.

        With replay.priority=correctness only queries that are partly right are kept, a query once: its latest group
        takes the place of an earlier one, or, all right or all wrong, just removes it. With replay.unit=sample the
        group's one sample is the right one of the lowest `nll`, among those with an advantage above 0.

        Raises:
            ConfigError: an advantage that is not finite, or too large to weigh, naming the query; nothing is added.
        """
        units = self._latest(samples) if self._by_correctness else self._units(samples)
        entries = [self._entry(unit, self._adds) for unit in units]
        self._check(entries)
        self._adds += 1
        self.forget({sample.query.id for sample in samples})
        room = self._config.capacity
        first = len(entries)  # of the new entries that fit at all: the newest
        while first and room >= len(entries[first - 1].samples):
            first -= 1
            room -= len(entries[first].samples)
        entries = entries[first:]
        incoming = sum(len(entry.samples) for entry in entries)
        leaving, remaining = [], self._size
        for slot, entry in self._entries.items():
            if remaining + incoming <= self._config.capacity:
                break
            leaving.append(slot)
            remaining -= len(entry.samples)
        self._release(leaving)
        slots = [self._free.popleft() for _ in entries]
        self._entries.update(zip(slots, entries, strict=True))
        self._size += incoming
        # A slot that is free again may be taken at once: of its two priorities the last one holds.
        self._weigh(leaving + slots, [0.0] * len(leaving) + [entry.priority for entry in entries])

    def forget(self, queries: Collection[str]) -> None:
        """With replay.priority=correctness remove what is kept of these queries (ids), which were answered again."""
        if self._by_correctness:
            slots = [slot for slot, entry in self._entries.items() if entry.samples[0].query.id in queries]
            self._release(slots)
            self._weigh(slots, [0.0] * len(slots))

    def draw(self, n: int, progress: float = 0.0) -> list[Sample]:
        """Draw samples with P(j) in proportion to |A_j|^alpha, or, with replay.priority=correctness, to the weight of
        j's bucket over its size; with replay.age_decay also to exp(-age / age_decay). With replay.unit=group, groups.

        With an importance exponent b > 0 a draw's weight is multiplied by (1 / (entries * P(j)))^b, where only entries
        that can be drawn count; b goes from `importance_exponent` to `importance_exponent_end` with `progress`, 0 to 1.

        Returns:
            n copies of samples; without replacement no more than the buffer holds; none from an empty buffer. A last
            group that does not fit is cut.
        """
        config = self._config
        drawable = self._weigh_again() if self._weighs_again and n > 0 else len(self._entries)
        entries = n if config.replacement else min(n, drawable)
        if entries <= 0 or not drawable:
            self.drawn_age_mean = 0.0
            return []
        # Every entry holds a sample at least, so n entries are enough.
        slots = self._tree.sample(entries, generator=self._generator, replacement=config.replacement)
        factors, exponent = [1.0] * entries, config.importance_exponent
        if config.importance_exponent_end is not None:
            exponent += progress * (config.importance_exponent_end - exponent)
        if exponent > 0:
            factors = (drawable * self._tree.probability(slots)).pow(-exponent).tolist()
        drawn = [
            (dataclasses.replace(sample, weight=sample.weight * factor), self._adds - 1 - self._entries[slot].added)
            for slot, factor in zip(slots.tolist(), factors, strict=True)
            for sample in self._entries[slot].samples
        ][:n]
        self.drawn_age_mean = sum(age for _, age in drawn) / len(drawn)
        return [sample for sample, _ in drawn]

    def end_episode(self, policy_version: int) -> None:
        """Empty the buffer, or, if it is kept across episodes, drop samples that are more than `max_age` versions older
        than `policy_version`, which the next episode's responses will have."""
        if self._config.clear_every_episode:
            leaving = list(self._entries)
        elif self._config.max_age is not None:
            oldest = policy_version - self._config.max_age
            leaving = [slot for slot, e in self._entries.items() if e.samples[0].policy_version < oldest]
        else:
            return
        self._release(leaving)
        self._weigh(leaving, [0.0] * len(leaving))

    def state_dict(self) -> dict[str, Any]:
        """Samples and the random stream: a restored buffer draws exactly what this one would.

        Weights follow from the samples. Each rank saves its own; the tokens of other ranks' samples are in theirs.
        """
        return {
            "entries": [(slot, list(entry.samples), entry.added) for slot, entry in self._entries.items()],
            "free": list(self._free),
            "adds": self._adds,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the saved state of a buffer with the same settings."""
        leaving = list(self._entries)
        self._entries = {slot: self._entry(list(samples), added) for slot, samples, added in state["entries"]}
        self._size = sum(len(entry.samples) for entry in self._entries.values())
        self._free = deque(state["free"])
        self._adds = state["adds"]
        self._generator.set_state(state["generator"])
        weights = [0.0] * len(leaving) + [entry.priority for entry in self._entries.values()]
        self._weigh([*leaving, *self._entries], weights)

    def _units(self, samples: list[Sample]) -> list[list[Sample]]:
        """What is drawn together: each sample that has an advantage, or those of a group."""
        samples = [sample for sample in samples if sample.advantage != 0]
        if self._config.unit == "sample":
            return [[sample] for sample in samples]
        return [list(group) for _, group in itertools.groupby(samples, key=lambda sample: sample.group)]

    def _latest(self, samples: list[Sample]) -> list[list[Sample]]:
        """What replay.priority=correctness keeps: of each query's last group in `samples`, what is drawn together."""
        kept: dict[str, list[Sample]] = {}
        for _, group in itertools.groupby(samples, key=lambda sample: sample.group):
            unit = list(group)
            query, partly = unit[0].query.id, 0 < unit[0].correctness < 1
            kept.pop(query, None)
            unit = [sample for sample in unit if partly and sample.advantage != 0]
            if self._config.unit == "sample":
                right = [sample for sample in unit if sample.right and not sample.advantage < 0]  # NaN is refused
                unit = sorted(right, key=lambda sample: sample.nll)[:1]
            if unit:
                kept[query] = unit
        return list(kept.values())

    def _entry(self, samples: list[Sample], added: int) -> _Entry:
        if self._by_correctness:
            priority = _bell(samples[0].correctness)
        elif self._weighs_again:
            priority = float(_DIGITS.power(Decimal(_size(samples)), Decimal(self._config.alpha)))
        else:
            priority = _size(samples)
        return _Entry(samples, added, priority)

    def _weigh_again(self) -> int:
        """Give every entry the weight that the rules give it now, and return how many can be drawn.

        Weights are relative, so the newest entry has age 0 and the heaviest one weighs almost the most that the tree
        takes: a unit of the tree is then at most capacity x 2^-60 of that. An entry below half a unit weighs 0.
        """
        entries, tau = list(self._entries.values()), self._config.age_decay
        if not entries:
            return 0
        weights = [entry.priority for entry in entries]
        if self._by_correctness:
            buckets = [entry.samples[0].correctness for entry in entries]
            sizes = Counter(buckets)
            weights = [weight / sizes[bucket] for weight, bucket in zip(weights, buckets, strict=True)]
        if tau is not None:
            newest = entries[-1].added
            weights = [w * _decay(newest - entry.added, tau) for w, entry in zip(weights, entries, strict=True)]
        scaled = torch.tensor(weights, dtype=torch.float64)
        _, exponent = math.frexp(max(weights))
        scaled *= 2.0 ** min(SumTree.WEIGHT_BITS - 1 - exponent, 1023)  # a power of 2 rounds nothing
        scaled[scaled < 0.5 * 2.0**-self._tree.fraction_bits] = 0.0
        self._weigh(list(self._entries), scaled)
        return int(scaled.count_nonzero())

    def _check(self, entries: list[_Entry]) -> None:
        """Fail on what the tree cannot weigh, before anything changes."""
        priorities = torch.tensor([entry.priority for entry in entries], dtype=torch.float64)
        finite = torch.tensor([math.isfinite(_size(entry.samples)) for entry in entries], dtype=torch.bool)
        fits = self._tree.accepts(priorities) & finite
        if not fits.all():
            entry = entries[fits.long().argmin()]
            raise ConfigError(
                f"replay.alpha={self._config.alpha}: the priority {_size(entry.samples)} of query "
                f"{entry.samples[0].query.id!r} must be finite, and below 2^{SumTree.WEIGHT_BITS} when raised to "
                "replay.alpha; algorithm.advantage_scale=std keeps advantages small"
            )

    def _release(self, slots: list[int]) -> None:
        """Forget the entries of these slots, whose weights are then to become 0."""
        for slot in slots:
            self._size -= len(self._entries.pop(slot).samples)
        self._free.extend(slots)

    def _weigh(self, slots: list[int], priorities: list[float] | torch.Tensor) -> None:
        if slots:
            self._tree.update(torch.tensor(slots), torch.as_tensor(priorities, dtype=torch.float64))


def _size(samples: list[Sample]) -> float:
    return math.fsum(abs(sample.advantage) for sample in samples)


def _bell(correctness: float) -> float:
    """ExGRPO's weight of a bucket, the normal density around 1/2 with sigma 1 but for its factor (arXiv 2510.02245,
    4.1)."""
    return float(_DIGITS.exp(Decimal(-((correctness - 0.5) ** 2) / 2)))


@functools.cache
def _decay(age: int, tau: float) -> float:
    """FreshPER's exp(-age / tau) (arXiv 2604.16918)."""
    return float(_DIGITS.exp(_DIGITS.divide(Decimal(-age), Decimal(tau))))
