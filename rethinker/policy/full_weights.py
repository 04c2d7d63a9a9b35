"""A policy's full weights out of ZeRO-3's parts, adapters merged in: what rollouts and checkpoints get."""

from __future__ import annotations

import itertools
import re
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
        for _, members in itertools.groupby(self._named, key=lambda named: _layer_of(named[0])):
            weights = dict(members)
            adapters = {name: self._adapters[name] for name in weights if name in self._adapters}
            parts = [part for adapter in adapters.values() for part in (adapter.a, adapter.b)]
            with deepspeed.zero.GatheredParameters([*weights.values(), *parts]):
                for name, parameter in weights.items():
                    weight = parameter.detach()
                    yield name, adapters[name].merged(weight) if name in adapters else weight


def _layer_of(name: str) -> str:
    """A parameter's name up to its first index, as `model.language_model.layers.3`."""
    found = re.match(r".*?\.\d+(?=\.|$)", name)
    return found[0] if found else name
