"""The replay buffer of Selective Sample Replay: single samples, drawn in proportion to |advantage|^alpha.

Every rank keeps its own copy, adds the same samples in the same order and draws from the same seed: the draws agree
without communication.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from typing import Any

import torch

from rethinker.config import ConfigError, ReplayConfig
from rethinker.samples import Sample
from rethinker_kernels import SumTree


class ReplayBuffer:
    """Samples with |advantage| > 0, at most `capacity`; the oldest leave first.

    Args:
        config: the `replay` settings.
        seed: seed of the draws; the same on every rank.

    Raises:
        ConfigError: a setting out of range.
    """

    def __init__(self, config: ReplayConfig, seed: int) -> None:
        if not 1 <= config.capacity <= 1 << 31:
            raise ConfigError(f"replay.capacity={config.capacity}: must be between 1 and 2^31")
        if not 0 <= config.alpha < math.inf:
            raise ConfigError(f"replay.alpha={config.alpha}: must be finite and at least 0")
        if not 0 <= config.importance_exponent < math.inf:
            raise ConfigError(f"replay.importance_exponent={config.importance_exponent}: must be finite and at least 0")
        if config.max_age is not None and config.max_age < 0:
            raise ConfigError(f"replay.max_age={config.max_age}: must be at least 0, or null")
        self._config = config
        self._tree = SumTree(config.capacity, alpha=config.alpha)
        self._samples: dict[int, Sample] = {}  # slot of the tree -> sample, oldest first
        self._free = deque(range(config.capacity))  # slots without a sample
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        """Samples in the buffer."""
        return len(self._samples)

    def add(self, samples: list[Sample]) -> None:
        """Keep these samples, in order; those with zero advantage carry no gradient and are left out.

        Raises:
            ConfigError: an advantage that is not finite, or too large to weigh, naming the query; nothing is added.
        """
        samples = [sample for sample in samples if sample.advantage != 0]
        priorities = torch.tensor([abs(sample.advantage) for sample in samples], dtype=torch.float64)
        fits = priorities.isfinite() & (priorities**self._config.alpha < 2.0**SumTree.WEIGHT_BITS)
        if not fits.all():
            sample = samples[fits.long().argmin()]
            raise ConfigError(
                f"replay.alpha={self._config.alpha}: the advantage {sample.advantage} of query {sample.query.id!r} "
                f"must be finite, and below 2^{SumTree.WEIGHT_BITS} when raised to replay.alpha; "
                "algorithm.advantage_scale=std keeps advantages small"
            )
        samples = samples[-self._config.capacity :]
        self._evict(list(self._samples)[: max(0, len(samples) - len(self._free))])
        slots = [self._free.popleft() for _ in samples]
        self._samples.update(zip(slots, samples, strict=True))
        self._tree.update(torch.tensor(slots, dtype=torch.int64), priorities[-self._config.capacity :])

    def draw(self, n: int) -> list[Sample]:
        """Draw samples with P(j) = |A_j|^alpha / sum_k |A_k|^alpha.

        With `importance_exponent` b > 0 a draw's weight is multiplied by (1 / (len(self) * P(j)))^b.

        Returns:
            n copies of samples; without replacement no more than the buffer holds; none from an empty buffer.
        """
        if not self._config.replacement:
            n = min(n, len(self))
        if n <= 0 or not self._samples:
            return []
        slots = self._tree.sample(n, generator=self._generator, replacement=self._config.replacement)
        factors = [1.0] * n
        if self._config.importance_exponent > 0:
            factors = (len(self) * self._tree.probability(slots)).pow(-self._config.importance_exponent).tolist()
        drawn = (self._samples[slot] for slot in slots.tolist())
        return [
            dataclasses.replace(sample, weight=sample.weight * factor)
            for sample, factor in zip(drawn, factors, strict=True)
        ]

    def end_episode(self, policy_version: int) -> None:
        """Empty the buffer, or, if it is kept across episodes, drop samples more than `max_age` versions old.

        Args:
            policy_version: the version that the next episode's responses will have.
        """
        if self._config.clear_every_episode:
            self._evict(list(self._samples))
        elif self._config.max_age is not None:
            oldest = policy_version - self._config.max_age
            self._evict([slot for slot, sample in self._samples.items() if sample.policy_version < oldest])

    def state_dict(self) -> dict[str, Any]:
        """Samples, weights and the random stream: a restored buffer draws exactly what this one would."""
        return {
            "samples": list(self._samples.items()),
            "free": list(self._free),
            "tree": self._tree.state_dict(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            ConfigError: it was saved with another `replay.capacity` or `replay.alpha`.
        """
        for name in ("capacity", "alpha"):
            saved, own = state["tree"][name], getattr(self._config, name)
            if saved != own:
                raise ConfigError(f"replay.{name}={own}: the checkpoint has {saved}; resume with that")
        self._tree.load_state_dict(state["tree"])
        self._samples = dict(state["samples"])
        self._free = deque(state["free"])
        self._generator.set_state(state["generator"])

    def _evict(self, slots: list[int]) -> None:
        for slot in slots:
            del self._samples[slot]
        self._free.extend(slots)
        self._tree.update(torch.tensor(slots, dtype=torch.int64), torch.zeros(len(slots)))
