"""SumTree: draw indices in proportion to priority^alpha, exactly, with integer sums that never drift.

Weights are fixed-point integers (int64 tensors). Integer sums are exact and do not depend on their order, so every
parent equals the sum of its children bit for bit after any number of updates, on every rank and device.
Layout: levels of fan-out 32 from the leaves (capacity, padded to 32) up to one root.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FAN_OUT = 32

SUM_BITS = 62
"""The sum of all weights stays at or below 2^62, so that a 63-bit random number times it fits two words."""

_LOW_31 = (1 << 31) - 1


class SumTree:
    """Weighted sampling over `capacity` slots, all of weight 0 at first.

    A weight is priority^alpha rounded to a multiple of 2^-fraction_bits, where fraction_bits = 62 - 16 -
    ceil(log2(capacity)): 26 bits at a capacity of 2^20, 46 at 1. A priority above 0 never rounds to weight 0; a
    priority of 0 has weight 0 for every alpha, and weight 0 is never drawn.

    Args:
        capacity: number of slots, 1 to 2^31.
        device: where the tree lives.
        alpha: exponent >= 0 on priorities; 0 draws uniformly among the priorities above 0.

    Raises:
        ValueError: an argument out of range.
    """

    WEIGHT_BITS = 16
    """A weight priority^alpha lies below 2^16; the bits that remain hold its fraction."""

    def __init__(self, capacity: int, device: torch.device | str = "cpu", alpha: float = 1.0) -> None:
        if not 1 <= capacity <= 1 << 31:
            raise ValueError(f"capacity={capacity}: must be between 1 and 2^31")
        if not 0 <= alpha < float("inf"):
            raise ValueError(f"alpha={alpha}: must be finite and at least 0")
        self.capacity = capacity
        self.alpha = float(alpha)
        self.fraction_bits = SUM_BITS - self.WEIGHT_BITS - (capacity - 1).bit_length()
        self._levels: list[Tensor] = []  # leaves first, root last; all but the root padded to a multiple of 32
        nodes = capacity
        while nodes > 1 or not self._levels:
            blocks = -(-nodes // FAN_OUT)
            self._levels.append(torch.zeros(blocks * FAN_OUT, dtype=torch.int64, device=device))
            nodes = blocks
        self._levels.append(torch.zeros(1, dtype=torch.int64, device=device))

    @property
    def total(self) -> Tensor:
        """Sum of all weights, in units of priority^alpha: a scalar fp64 tensor on the tree's device."""
        return self._levels[-1][0].double() * 2.0**-self.fraction_bits

    def update(self, indices: Tensor, priorities: Tensor) -> None:
        """Give slots new priorities; of an index that appears twice, the last one holds.

        Args:
            indices: [n] int64 in [0, capacity).
            priorities: [n] floating, finite, at least 0, with priority^alpha below 2^16.

        Raises:
            ValueError: a wrong shape or type, an index out of range, or a priority out of range, naming the slot.
                Nothing is changed then.
        """
        if indices.dim() != 1 or indices.dtype != torch.int64:
            raise ValueError(f"indices: must be int64 [n], not {indices.dtype} {list(indices.shape)}")
        if priorities.shape != indices.shape or not priorities.is_floating_point():
            raise ValueError(
                f"priorities: must be floating {list(indices.shape)}, not {priorities.dtype} {list(priorities.shape)}"
            )
        device = self._levels[0].device
        indices, priorities = indices.to(device), priorities.to(device, torch.float64)
        outside = (indices < 0) | (indices >= self.capacity)
        if outside.any():
            raise ValueError(f"indices: {indices[outside][0].item()} is outside [0, {self.capacity})")
        weights = priorities**self.alpha
        wrong = ~priorities.isfinite() | (priorities < 0) | ~(weights < 2.0**self.WEIGHT_BITS)
        if wrong.any():
            raise ValueError(
                f"priorities: {priorities[wrong][0].item()} at index {indices[wrong][0].item()} must be finite, at "
                f"least 0, and below 2^{self.WEIGHT_BITS} when raised to alpha={self.alpha}"
            )
        fixed = (weights * 2.0**self.fraction_bits).round().long()
        fixed = torch.where(priorities > 0, fixed.clamp(min=1, max=(1 << self.WEIGHT_BITS + self.fraction_bits) - 1), 0)

        # A stable sort puts an index's writes next to each other in their order: the last of each run holds.
        order = indices.argsort(stable=True)
        run = indices[order]
        last = torch.ones_like(run, dtype=torch.bool)
        last[:-1] = run[1:] != run[:-1]
        node, fixed = run[last], fixed[order[last]]
        change = fixed - self._levels[0][node]
        for level in self._levels:
            level.index_add_(0, node, change)
            node = node // FAN_OUT

    def probability(self, indices: Tensor) -> Tensor:
        """Probability fp64 [n] that one draw returns each of these slots; NaN while all weights are 0."""
        return self._levels[0][indices].double() / self._levels[-1].double()

    def sample(self, n: int, *, generator: torch.Generator | None, replacement: bool = True) -> Tensor:
        """Draw slots in proportion to their weights.

        Args:
            n: number of draws.
            generator: source of 63 random bits per draw (per slot without replacement), on the tree's device.
            replacement: whether a slot may come twice. Without, draws are successive: each in proportion to the
                weights of the slots not drawn yet.

        Returns:
            [n] int64 slots, in the order of the draws.

        Raises:
            ValueError: every weight is 0, or (without replacement) fewer than n are above 0.
        """
        if n < 0:
            raise ValueError(f"n={n}: must be at least 0")
        leaves, root = self._levels[0], self._levels[-1]
        if n == 0:
            return leaves.new_empty(0)
        if not root.any():
            raise ValueError("sample: every weight in the tree is 0; there is nothing to draw")
        if not replacement:
            return self._race(n, generator)

        rest = _multiply_high(_random_63(n, leaves, generator), root)  # [n], uniform in [0, total)
        node = torch.zeros_like(rest)
        for level in reversed(self._levels[:-1]):
            below = level.view(-1, FAN_OUT)[node].cumsum(-1)  # [n, 32]
            # The first child whose running sum exceeds `rest`: its own weight is then above 0.
            child = (below <= rest[:, None]).sum(-1)
            before = below.gather(1, (child - 1).clamp(min=0)[:, None]).squeeze(1)
            rest = rest - torch.where(child > 0, before, 0)
            node = node * FAN_OUT + child
        return node

    def _race(self, n: int, generator: torch.Generator | None) -> Tensor:
        """Successive draws at once: slot i finishes after Exponential(1) / weight_i; the n first, in their order."""
        candidates = self._levels[0].nonzero().squeeze(1)
        if n > len(candidates):
            raise ValueError(f"n={n}: only {len(candidates)} slots have a weight above 0 (replacement=False)")
        uniform = (_random_63(len(candidates), candidates, generator).double() + 0.5) * 2.0**-63
        finish = -torch.log1p(-uniform.clamp(max=1 - 2.0**-53)) / self._levels[0][candidates]
        return candidates[finish.topk(n, largest=False, sorted=True).indices]

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs; parents are sums and need not be kept."""
        return {
            "capacity": self.capacity,
            "alpha": self.alpha,
            "leaves": self._levels[0][: self.capacity].cpu().clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the weights exactly.

        Raises:
            ValueError: the state is of a tree with another capacity or alpha.
        """
        for name, own in (("capacity", self.capacity), ("alpha", self.alpha)):
            if state[name] != own:
                raise ValueError(f"{name}: the saved tree has {state[name]}, this one {own}")
        self._levels[0][: self.capacity] = state["leaves"].to(self._levels[0].device)
        for children, parents in zip(self._levels, self._levels[1:], strict=False):
            sums = children.view(-1, FAN_OUT).sum(-1)
            parents[: len(sums)] = sums


def _random_63(n: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """[n] int64, uniform in [0, 2^63)."""
    return torch.empty(n, dtype=torch.int64, device=like.device).random_(generator=generator)


def _multiply_high(x: Tensor, y: Tensor) -> Tensor:
    """floor(x * y / 2^63) for x < 2^63 and y <= 2^62, in 31-bit limbs: no product overflows int64."""
    x_high, x_low, y_high, y_low = x >> 31, x & _LOW_31, y >> 31, y & _LOW_31  # 32, 31, 31 (and 2^31), 31 bits
    left, right = x_high * y_low, x_low * y_high
    carry = (left & _LOW_31) + (right & _LOW_31) + (x_low * y_low >> 31)
    return (x_high * y_high + (left >> 31) + (right >> 31) + (carry >> 31)) >> 1
