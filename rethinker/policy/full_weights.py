"""A policy's full weights out of ZeRO-3's parts, adapters merged in: what rollouts and checkpoints get."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

import deepspeed
import torch

from rethinker.policy.lora import Adapter


class FullWeights:
    """A policy's weights as (name, full tensor), re-iterable; each pass gathers one decoder layer at a time.

    Iterating is collective: every rank must take the whole pass.
    """

    def __init__(
        self, named: list[tuple[str, torch.nn.Parameter]], adapters: Mapping[str, Adapter] = MappingProxyType({})
    ) -> None:
        """
        Args:
            named: parameters in order, whole or partitioned.
            adapters: by the name of the weight that each is merged into, on its way out.
        """
        self._named, self._adapters = named, adapters

    def metadata(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """(name, dtype, full shape) of every weight, in the order of iteration, without gathering any."""
        return [(name, p.dtype, tuple(getattr(p, "ds_shape", p.shape))) for name, p in self._named]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for _, members in _by_layer(self._named):
            adapters = {name: self._adapters[name] for name, _ in members if name in self._adapters}
            parts = [part for adapter in adapters.values() for part in (adapter.a, adapter.b)]
            with deepspeed.zero.GatheredParameters([*(p for _, p in members), *parts]):
                for name, parameter in members:
                    weight = parameter.detach()
                    yield name, adapters[name].merged(weight) if name in adapters else weight


def _by_layer(named: list[tuple[str, torch.nn.Parameter]]) -> list[tuple[str, list[tuple[str, torch.nn.Parameter]]]]:
    """Consecutive parameters that share everything up to their first index: `model.language_model.layers.3`."""
    layers: list[tuple[str, list[tuple[str, torch.nn.Parameter]]]] = []
    for name, parameter in named:
        parts = name.split(".")
        digit = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        key = name if digit is None else ".".join(parts[: digit + 1])
        if not layers or layers[-1][0] != key:
            layers.append((key, []))
        layers[-1][1].append((name, parameter))
    return layers
