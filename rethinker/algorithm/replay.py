"""The replay buffer of Selective Sample Replay: samples drawn in proportion to |advantage|^alpha.

The distribution is global: every rank holds the same tree over all ranks' samples and draws from the same seed, so the
draws agree without communication. The tokens of a sample stay with the rank that owns it (runtime/ownership.py). The
tree is on the host, which needs the drawn slots.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import deque
from typing import Any

import torch

from rethinker.config import ConfigError, ReplayConfig
from rethinker.samples import Sample
from rethinker_kernels import SumTree


@dataclasses.dataclass(frozen=True)
class _Entry:
    """What one draw returns: a sample, or with replay.unit=group the effective samples of a query."""

    samples: list[Sample]
    added: int  # the number of the `add` it came with, from 0

    @property
    def priority(self) -> float:
        return math.fsum(abs(sample.advantage) for sample in self.samples)


class ReplayBuffer:
    """Samples with |advantage| > 0, at most `capacity`; the oldest leave first. The seed is the same on every rank."""

    def __init__(self, config: ReplayConfig, seed: int) -> None:
        self._config = config
        self._tree = SumTree(config.capacity, alpha=config.alpha)
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

        Raises:
            ConfigError: an advantage that is not finite, or too large to weigh, naming the query; nothing is added.
        """
        samples = [sample for sample in samples if sample.advantage != 0]
        units = [[sample] for sample in samples]
        if self._config.unit == "group":
            units = [list(group) for _, group in itertools.groupby(samples, key=lambda sample: sample.group)]
        entries = [_Entry(unit, self._adds) for unit in units]
        self._check(entries)
        self._adds += 1
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

    def draw(self, n: int) -> list[Sample]:
        """Draw samples with P(j) = |A_j|^alpha / sum_k |A_k|^alpha; with replay.unit=group, whole groups.

        With `importance_exponent` b > 0 a draw's weight is multiplied by (1 / (entries * P(j)))^b.

        Returns:
            n copies of samples; without replacement no more than the buffer holds; none from an empty buffer. A last
            group that does not fit is cut.
        """
        config = self._config
        entries = n if config.replacement else min(n, len(self._entries))
        if entries <= 0 or not self._entries:
            self.drawn_age_mean = 0.0
            return []
        # Every entry holds a sample at least, so n entries are enough.
        slots = self._tree.sample(entries, generator=self._generator, replacement=config.replacement)
        factors = [1.0] * entries
        if config.importance_exponent > 0:
            chances = self._tree.probability(slots)
            factors = (len(self._entries) * chances).pow(-config.importance_exponent).tolist()
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
        self._entries = {slot: _Entry(list(samples), added) for slot, samples, added in state["entries"]}
        self._size = sum(len(entry.samples) for entry in self._entries.values())
        self._free = deque(state["free"])
        self._adds = state["adds"]
        self._generator.set_state(state["generator"])
        weights = [0.0] * len(leaving) + [entry.priority for entry in self._entries.values()]
        self._weigh([*leaving, *self._entries], weights)

    def _check(self, entries: list[_Entry]) -> None:
        """Fail on what the tree cannot weigh, before anything changes."""
        priorities = torch.tensor([entry.priority for entry in entries], dtype=torch.float64)
        fits = self._tree.accepts(priorities)
        if not fits.all():
            entry = entries[fits.long().argmin()]
            raise ConfigError(
                f"replay.alpha={self._config.alpha}: the priority {entry.priority} of query "
                f"{entry.samples[0].query.id!r} must be finite, and below 2^{SumTree.WEIGHT_BITS} when raised to "
                "replay.alpha; algorithm.advantage_scale=std keeps advantages small"
            )

    def _release(self, slots: list[int]) -> None:
        """Forget the entries of these slots, whose weights are then to become 0."""
        for slot in slots:
            self._size -= len(self._entries.pop(slot).samples)
        self._free.extend(slots)

    def _weigh(self, slots: list[int], priorities: list[float]) -> None:
        if slots:
            self._tree.update(torch.tensor(slots), torch.tensor(priorities, dtype=torch.float64))
