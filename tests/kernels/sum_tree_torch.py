"""The sum tree's ops in PyTorch: csrc's integer arithmetic bit for bit, by other means.

Products of two 32-bit numbers wrap around in int64; their high half is read with a mask, as if they were unsigned.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rethinker_kernels import SumTree
from rethinker_kernels.sum_tree import BAD_INDEX, FAN_OUT, WEIGHT_BITS

BAD_PRIORITY = 2
_LOW = 0xFFFFFFFF


class TorchTree(SumTree):
    """A tree whose ops are these; `_run` is where others have their compiled ones."""

    def _run(self, op: str, *arguments: Tensor | float) -> None:
        {"update": self._update, "sample": self._sample}[op](*arguments)

    def _update(self, alpha: float, indices: Tensor, priorities: Tensor, n: int, refused: Tensor) -> None:
        inside = (indices >= 0) & (indices < self.capacity)
        weights, accepted = fixed_point(priorities, alpha, self.fraction_bits)
        if not (inside & accepted).all():
            first = int((inside & accepted).long().argmin())
            refused[0] = BAD_PRIORITY if inside[first] else BAD_INDEX
            refused[1], refused[2] = indices[first], priorities[first : first + 1].view(torch.int64)[0]
            return
        # A stable sort puts an index's writes next to each other in their order: the last of each run holds.
        order = indices.argsort(stable=True)
        run = indices[order]
        last = torch.ones_like(run, dtype=torch.bool)
        last[:-1] = run[1:] != run[:-1]
        slots = run[last]
        self._add(slots, weights[order[last]] - self._nodes[slots])

    def _sample(self, key: Tensor, round: int, n: int, slots: Tensor) -> None:
        if self._nodes[-1] == 0:
            slots.fill_(-1)
            return
        rest = multiply_high(*random_64(key, torch.arange(n), round), self._nodes[-1])
        node = torch.zeros_like(rest)
        for level in reversed(self._levels[:-1]):
            running = level.view(-1, FAN_OUT)[node].cumsum(-1)  # [n, 32]
            # The first child whose running sum exceeds `rest`: its own weight is then above 0.
            child = (running[:, :-1] <= rest[:, None]).sum(-1)
            before = running.gather(1, (child - 1).clamp(min=0)[:, None]).squeeze(1)
            rest = rest - torch.where(child > 0, before, 0)
            node = node * FAN_OUT + child
        slots.copy_(node)


def fixed_point(priorities: Tensor, alpha: float, fraction: int) -> tuple[Tensor, Tensor]:
    """Weights int64 [n], and which priorities fp64 [n] are legal; the weights of others are meaningless."""
    accepted = priorities.isfinite() & (priorities >= 0)
    positive = accepted & (priorities > 0)
    value = power(torch.where(positive, priorities, 1.0), alpha)
    most = (1 << WEIGHT_BITS + fraction) - 1
    fits = value < 2.0**WEIGHT_BITS
    rounded = (torch.where(fits, value, 1.0) * 2.0**fraction).round().long().clamp(min=1, max=most)
    return torch.where(positive, rounded, 0), accepted & fits


def power(x: Tensor, alpha: float) -> Tensor:
    """x^alpha, operation by operation as in sum_tree.h, where it is explained."""
    if alpha == 1:
        return x
    if alpha == 0:
        return torch.ones_like(x)
    subnormal = x < 2.0**-1022
    bits = torch.where(subnormal, x * 2.0**54, x).view(torch.int64)
    exponent = torch.where(subnormal, -54, 0) + ((bits >> 52) - 1023)
    m = ((bits & (1 << 52) - 1) | 1023 << 52).view(torch.float64)
    large = m > 1.4142135623730951
    m, exponent = torch.where(large, m * 0.5, m), exponent + large
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    series = torch.full_like(x, 1.0 / 23)
    for k in range(21, 0, -2):
        series = series * z + 1.0 / k
    y = (alpha * (exponent.double() + (s * series) * 2.8853900817779268)).clamp(-1000.0, 1000.0)
    whole = y.round()
    t = (y - whole) * 0.6931471805599453
    e = torch.full_like(x, 1.0 / math.factorial(13))
    for k in range(12, -1, -1):
        e = e * t + 1.0 / math.factorial(k)
    return e * ((whole.long() + 1023) << 52).view(torch.float64)


def random_64(key: Tensor, draws: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the random numbers of these draws of a round: Philox4x32-10, int64 [n] each."""
    seed, offset = key[0], key[1]
    keys = [seed & _LOW, seed >> 32 & _LOW]
    c0, c1 = draws, torch.full_like(draws, step)
    c2, c3 = (half.expand_as(draws) for half in (offset & _LOW, offset >> 32 & _LOW))
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32 & _LOW) ^ c1 ^ keys[0], b & _LOW, (a >> 32 & _LOW) ^ c3 ^ keys[1], a & _LOW
        keys = [keys[0] + 0x9E3779B9 & _LOW, keys[1] + 0xBB67AE85 & _LOW]
    return c1, c0


def multiply_high(high: Tensor, low: Tensor, y: Tensor) -> Tensor:
    """floor((high * 2^32 + low) * y / 2^64) for y <= 2^62."""
    y_high, y_low = y >> 32, y & _LOW
    left, right = high * y_low, low * y_high
    carry = (left & _LOW) + (right & _LOW) + (low * y_low >> 32 & _LOW)
    return high * y_high + (left >> 32 & _LOW) + (right >> 32 & _LOW) + (carry >> 32)
