"""SumTree: draw indices in proportion to priority^alpha, exactly, with integer sums that never drift.

Weights are fixed-point integers. Integer sums are exact and do not depend on their order, so every parent equals the
sum of its children bit for bit after any number of updates, on every rank and device.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

from rethinker_kernels import native
from rethinker_kernels.arguments import check
from rethinker_kernels.devices import on_device_of, to_device

# As in csrc/sum_tree.h.
FAN_OUT = 32
SUM_BITS = 62
WEIGHT_BITS = 27
BAD_INDEX = 1


class SumTree:
    """Weighted sampling over `capacity` slots, all of weight 0 at first.

        weights = priorities**alpha
        slots = torch.multinomial(weights, n, replacement)

    but in time that grows with log(capacity), for any capacity, with 64 random bits per draw, and exactly: a weight is
    priority^alpha rounded to a multiple of 2^-fraction_bits, where fraction_bits = 62 - 27 - ceil(log2(capacity)), so
    that all weights together stay at or below 2^62. The unit bounds how finely small weights are told apart: it is
    3e-5 (2^-15) at a capacity of 2^20 and 5e-7 (2^-21) at 2^14, and a weight w is off by at most half a unit, 0.15%
    for w = 0.01 at 2^20. A priority above 0 weighs at least one unit, so that one far below is drawn too often beside
    others; a priority of 0 has weight 0 for every alpha, and weight 0 is never drawn.

    On CUDA, update and sample (with replacement) are one launch each and wait for nothing; they can be captured in a
    CUDA graph if their tensors are on the device (priorities in fp64) and the random numbers come from a (seed, offset)
    tensor. What the host does not know is not raised at once: an update that contains a bad index or priority changes
    nothing and is raised by the next `check` or `state_dict`; a draw from nothing returns -1. A tree belongs to one
    thread and stream at a time: a draw without replacement takes slots out while it runs.

    Args:
        capacity: number of slots, 1 to 2^31.
        device: where the tree lives; the draws are the same everywhere.
        alpha: exponent >= 0 on priorities; 0 draws uniformly among the priorities above 0.

    Raises:
        ValueError: an argument out of range.
        BuildError: there is no C++ compiler, or for a tree on a GPU no nvcc.
    """

    WEIGHT_BITS = WEIGHT_BITS
    """A weight priority^alpha lies below 2^27 (1.3e8); the bits that remain hold its fraction."""

    def __init__(self, capacity: int, device: torch.device | str = "cpu", alpha: float = 1.0) -> None:
        if not 1 <= capacity <= 1 << 31:
            raise ValueError(f"capacity={capacity}: must be between 1 and 2^31")
        if not 0 <= alpha < float("inf"):
            raise ValueError(f"alpha={alpha}: must be finite and at least 0")
        device = torch.device(device)
        self._library = native.load(device.type)
        self.capacity = capacity
        self.alpha = float(alpha)
        self.fraction_bits = SUM_BITS - WEIGHT_BITS - (capacity - 1).bit_length()
        sizes = levels_of(capacity)
        self._nodes = torch.zeros(sum(sizes), dtype=torch.int64, device=device)  # leaves first, root last
        self._levels = self._nodes.split(sizes)
        self._refused = torch.zeros(3, dtype=torch.int64, device=device)  # kind, index, bits of the priority
        self._on_host = device.type == "cpu"

    @property
    def device(self) -> torch.device:
        """Where the tree lives."""
        return self._nodes.device

    @property
    def total(self) -> Tensor:
        """Sum of all weights, in units of priority^alpha: a scalar fp64 tensor on the tree's device."""
        return self._nodes[-1].double() * 2.0**-self.fraction_bits

    def update(self, indices: Tensor, priorities: Tensor) -> None:
        """Give slots new priorities; of an index that appears twice, the last one holds.

        Args:
            indices: [n] int64 in [0, capacity).
            priorities: [n] floating, finite, at least 0, with priority^alpha below 2^27 (see `accepts`).

        Raises:
            ValueError: a wrong shape or type, an index out of range, or a priority out of range, naming the slot.
                Nothing is changed then. On CUDA the two latter are raised by `check`.
        """
        check("indices", indices, (indices.numel(),), dtypes=(torch.int64,))
        check("priorities", priorities, indices.shape)
        indices = to_device(indices, self.device).contiguous()
        priorities = to_device(priorities.detach().double(), self.device).contiguous()
        self._run("update", self.alpha, indices, priorities, len(indices), self._refused)
        if self._on_host:
            self.check()

    def accepts(self, priorities: Tensor) -> Tensor:
        """Whether `update` surely takes these priorities [n]: bool [n]. Where they are on the host, so is the work."""
        most = 2.0**WEIGHT_BITS * (1 - 1e-12)  # the device's power may differ from this one in its last bits
        return (priorities >= 0) & priorities.isfinite() & (priorities.double() ** self.alpha < most)

    def check(self) -> None:
        """Raise what updates on a GPU could not raise at once: the first one that was refused. Waits for the device.

        Raises:
            ValueError: an update had an index or priority out of range, and changed nothing.
        """
        kind, index, bits = self._refused.tolist()
        if not kind:
            return
        self._refused.zero_()
        if kind == BAD_INDEX:
            raise ValueError(f"indices: {index} is outside [0, {self.capacity})")
        (priority,) = struct.unpack("d", struct.pack("q", bits))
        raise ValueError(
            f"priorities: {priority} at index {index} must be finite, at least 0, and below 2^{WEIGHT_BITS} when "
            f"raised to alpha={self.alpha}"
        )

    def probability(self, indices: Tensor) -> Tensor:
        """Probability fp64 [n] that one draw returns each of these slots; NaN while all weights are 0."""
        return self._levels[0][indices].double() / self._nodes[-1].double()

    def sample(self, n: int, *, generator: torch.Generator | Tensor | None, replacement: bool = True) -> Tensor:
        """Draw slots in proportion to their weights.

        Args:
            n: number of draws, at most 2^31.
            generator: where the random numbers come from: a torch.Generator (None: the device's default one), which
                gives a seed and an offset for this call; or int64 [2] (seed, offset) on the tree's device, of which
                the draws are then a pure function. Each offset is a stream of its own: add 1 for the next call.
            replacement: whether a slot may come twice. Without, draws are successive: each in proportion to the
                weights of the slots not drawn yet.

        Returns:
            [n] int64 slots, in the order of the draws. On a GPU -1 stands for draws that found every weight 0.

        Raises:
            ValueError: every weight is 0, or (without replacement) fewer than n are above 0; not raised on a GPU.
        """
        if not 0 <= n <= 1 << 31:
            raise ValueError(f"n={n}: must be between 0 and 2^31")
        if n == 0:
            return torch.empty(0, dtype=torch.int64, device=self.device)
        key = self._key(generator)
        slots = self._draw(key, n) if replacement else self._draw_distinct(key, n)
        if self._on_host and slots[-1].item() < 0:
            if self._nodes[-1].item() == 0:
                raise ValueError("sample: every weight in the tree is 0; there is nothing to draw")
            raise ValueError(
                f"n={n}: only {self._levels[0].count_nonzero()} slots have a weight above 0 (replacement=False)"
            )
        return slots

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs; parents are sums and need not be kept.

        Raises:
            ValueError: see `check`.
        """
        self.check()
        return {
            "capacity": self.capacity,
            "alpha": self.alpha,
            "fraction_bits": self.fraction_bits,
            "leaves": self._levels[0][: self.capacity].cpu().clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the weights exactly.

        Raises:
            ValueError: the state is of a tree with another capacity or alpha, or of a release with other units.
        """
        for name in ("capacity", "alpha", "fraction_bits"):
            if state.get(name) != getattr(self, name):
                raise ValueError(f"{name}: the saved tree has {state.get(name)}, this one {getattr(self, name)}")
        self._levels[0][: self.capacity] = state["leaves"].to(self.device)
        for children, parents in zip(self._levels, self._levels[1:], strict=False):
            sums = children.view(-1, FAN_OUT).sum(-1)
            parents[: len(sums)] = sums

    def _key(self, generator: torch.Generator | Tensor | None) -> Tensor:
        """(seed, offset) int64 [2] of one call, on the tree's device."""
        if not isinstance(generator, Tensor):
            source = self.device if generator is None else generator.device
            key = torch.empty(2, dtype=torch.int64, device=source).random_(generator=generator)
            return to_device(key, self.device)
        check("generator", generator, (2,), like=self._nodes, dtypes=(torch.int64,))
        return generator.contiguous()

    def _draw(self, key: Tensor, n: int, round: int = 0) -> Tensor:
        """[n] independent draws; those of another round have other random numbers."""
        slots = torch.empty(n, dtype=torch.int64, device=self.device)
        self._run("sample", key, round, n, slots)
        return slots

    def _draw_distinct(self, key: Tensor, n: int) -> Tensor:
        """[n] successive draws, and -1 where no weight is left.

        Independent draws, of which only each slot's first counts, are just that: given the slots found so far, the next
        new one comes in proportion to the weights of the others. A round makes as many draws as are missing. The next
        one makes them from a tree without the slots found before, so that it finds one at least; in the end they
        come back.
        """
        slots = torch.full((n,), -1, dtype=torch.int64, device=self.device)
        weights, found, round = torch.empty_like(slots), 0, 0
        try:
            while found < n and self._nodes[-1] > 0:
                new = list(dict.fromkeys(self._draw(key, n - found, round).tolist()))
                part = slice(found, found + len(new))
                slots[part] = to_device(torch.tensor(new), self.device)
                weights[part] = self._levels[0][slots[part]]
                self._add(slots[part], -weights[part])
                found, round = part.stop, round + 1
        finally:
            self._add(slots[:found], weights[:found])
        return slots

    def _add(self, slots: Tensor, changes: Tensor) -> None:
        """Add to slots, each of them once, and to all their ancestors."""
        for level in self._levels:
            level.index_add_(0, slots, changes)
            slots = slots // FAN_OUT

    def _run(self, op: str, *arguments: Tensor | float) -> None:
        """Run a function of the library on the tree, as csrc/sum_tree.h declares it; tensors become addresses."""
        given = [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments]
        with on_device_of(self._nodes):
            stream = None if self._on_host else torch.cuda.current_stream(self.device).cuda_stream
            error = getattr(self._library, f"sum_tree_{op}")(self._nodes.data_ptr(), self.capacity, *given, stream)
        if error:
            raise RuntimeError(f"sum tree: {error.decode()}")


def levels_of(capacity: int) -> list[int]:
    """Nodes of each level, leaves first: all but the root (1) padded to a multiple of 32."""
    levels, nodes = [], capacity
    while nodes > 1 or not levels:
        blocks = -(-nodes // FAN_OUT)
        levels.append(blocks * FAN_OUT)
        nodes = blocks
    return [*levels, 1]
