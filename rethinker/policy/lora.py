"""LoRA: small trained matrices beside frozen linear layers; and the full weights that a policy amounts to.

A weight W [out, in] of the language model's decoder layers becomes W + (alpha / rank) B A, with A [rank, in] and
B [out, rank] (arXiv 2106.09685). peft puts A and B beside the layer, in the layer's own module tree; W never changes.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rethinker.checks import lora_targets
from rethinker.config import LoraConfig
from rethinker.families import family_of

FOLDER = "adapter"  # of a checkpoint: the adapters alone, in peft's format
_NAME = "default"  # peft's, of the adapters that are trained
_REFERENCE = "reference"  # of a frozen copy of them, where the reference policy moves
GATHERED = 2**28
"""Elements that are gathered at once; a weight that has more is gathered alone, as a 3B model's embedding is."""


@dataclass(frozen=True)
class Adapter:
    """What a frozen weight is trained by."""

    layer: Any  # peft's, around the linear layer

    @property
    def a(self) -> nn.Parameter:
        """A [rank, in]."""
        return self.layer.lora_A[_NAME].weight

    @property
    def b(self) -> nn.Parameter:
        """B [out, rank]."""
        return self.layer.lora_B[_NAME].weight

    @torch.no_grad()
    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """W + (alpha / rank) B A [out, in], added in fp32 and rounded once to the type of W; `weight` stays as it is.

        Args:
            weight: W [out, in]; A and B must be whole, too.
        """
        scale = self.layer.scaling[_NAME]
        return torch.addmm(weight.float(), self.b.float(), self.a.float(), alpha=scale).to(weight.dtype)


class FullWeights:
    """A policy's weights as (name, full tensor), re-iterable; each pass gathers GATHERED elements at a time.

    Iterating is collective: every rank must take the whole pass.
    """

    def __init__(
        self, named: list[tuple[str, torch.Tensor]], adapters: Mapping[str, Adapter] = MappingProxyType({})
    ) -> None:
        """
        Args:
            named: parameters, whole or partitioned, and buffers, in order.
            adapters: by the name of the weight that each is merged into, on its way out.
        """
        self._named, self._adapters = named, adapters

    def metadata(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """(name, dtype, full shape) of every weight, in the order of iteration, without gathering any."""
        return [(name, p.dtype, tuple(getattr(p, "ds_shape", p.shape))) for name, p in self._named]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        import deepspeed  # takes seconds, and `rethinker plan` needs the adapters alone

        for weights in self._groups():
            adapters = {name: self._adapters[name] for name in weights if name in self._adapters}
            parts = [part for adapter in adapters.values() for part in (adapter.a, adapter.b)]
            with deepspeed.zero.GatheredParameters([*weights.values(), *parts]):
                for name, parameter in weights.items():
                    weight = parameter.detach()
                    yield name, adapters[name].merged(weight) if name in adapters else weight

    def _groups(self) -> Iterator[dict[str, torch.Tensor]]:
        group: dict[str, torch.Tensor] = {}
        elements = 0
        for name, parameter in self._named:
            more = getattr(parameter, "ds_numel", parameter.numel())
            if group and elements + more > GATHERED:
                yield group
                group, elements = {}, 0
            group[name] = parameter
            elements += more
        if group:
            yield group


def add_adapters(model: nn.Module, lora: LoraConfig, seed: int) -> dict[str, Adapter]:
    """Freeze a model and put adapters into its decoder layers: A random, B zero, so that nothing changes yet.

    Args:
        model: from `load_model`, its weights partitioned or not.
        lora: policy.lora, switched on.
        seed: of A; every rank draws the same, and the process's random stream is left alone.

    Returns:
        The adapter of each weight, by the weight's Hugging Face name.

    Raises:
        ConfigError: a name in policy.lora.target_modules is no linear layer's.
    """
    import peft

    layers = family_of(model.config.model_type).language_model(model).layers
    (path,) = (name for name, module in model.named_modules() if module is layers)
    linears = {name for layer in layers for name, part in layer.named_modules() if isinstance(part, nn.Linear)}
    targets = "|".join(map(re.escape, lora_targets(linears, lora.target_modules)))
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,  # the policy trains without: the ratio would not be 1 on policy
        target_modules=rf"{re.escape(path)}\.\d+\.({targets})",
    )
    # Only the layers are handed over: in a whole model of some types peft takes every layer's gate_proj for experts'.
    within = replace(config, target_modules=rf"\d+\.({targets})")
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        peft.inject_adapter_in_model(within, layers, _NAME)
    model.peft_config = {_NAME: config}
    return {f"{name}.weight": Adapter(part) for name, part in model.named_modules() if hasattr(part, "lora_A")}


def add_reference(adapters: dict[str, Adapter]) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Put a frozen copy of A and B beside them, which `reference_on` computes with, before ZeRO-3 partitions them.

    Returns:
        (what is trained, its copy) by a name of their own.
    """
    pairs = {}
    for name, adapter in adapters.items():
        layer = adapter.layer
        for kind, part in (("A", layer.lora_A), ("B", layer.lora_B)):
            part[_REFERENCE] = copy.deepcopy(part[_NAME]).requires_grad_(False)
            pairs[f"{name}.{kind}"] = part[_NAME].weight, part[_REFERENCE].weight
        layer.lora_dropout[_REFERENCE], layer.scaling[_REFERENCE] = nn.Identity(), layer.scaling[_NAME]
    return pairs


def base_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that the model has without adapters, under their Hugging Face names and in its order."""
    named = model.named_parameters()
    return [(name.replace(".base_layer.", "."), p) for name, p in named if not re.search(r"\.lora_[AB]\.", name)]


def base_weights(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """All that a checkpoint has of the model without adapters: `base_parameters`, and the buffers that it keeps, which
    are whole on every rank."""
    kept = model.state_dict(keep_vars=True).keys()
    return base_parameters(model) + [(name, buffer) for name, buffer in model.named_buffers() if name in kept]


def adapter_parameters(adapters: dict[str, Adapter]) -> list[tuple[str, nn.Parameter]]:
    """All A and B under the names that they have in peft's files."""
    stems = {f"base_model.model.{name.removesuffix('.weight')}": adapter for name, adapter in adapters.items()}
    return [(f"{stem}.lora_{kind}.weight", p) for stem, x in stems.items() for kind, p in (("A", x.a), ("B", x.b))]


@contextmanager
def reference_on(adapters: dict[str, Adapter]) -> Iterator[None]:
    """Within it the model computes as its reference policy: with the adapters of `add_reference`, or where there are
    none, as it did before it was trained."""
    # peft's own switches would also take the adapters' gradients away, behind ZeRO-3's back.
    layers = [adapter.layer for adapter in adapters.values()]
    trained = [layer._active_adapter for layer in layers]  # as it was given: compiled layers look at its type, too
    for layer in layers:
        if _REFERENCE in layer.lora_A:
            layer._active_adapter = _REFERENCE
        else:
            layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, name in zip(layers, trained, strict=True):
            layer._active_adapter, layer._disable_adapters = name, False


def save_config(folder: Path, model: nn.Module, base: str | Path) -> None:
    """Write what `peft.PeftModel.from_pretrained` must know of a model's adapters, beside `base`."""
    config = copy.copy(model.peft_config[_NAME])
    config.base_model_name_or_path = str(Path(base).resolve() if Path(base).is_dir() else base)
    config.inference_mode = True
    config.save_pretrained(folder)


def save_weights(folder: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Write a model's adapters (`adapter_parameters`, whole), beside `save_config`'s file."""
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def load(adapters: dict[str, Adapter], folder: Path) -> None:
    """Take A and B from a folder of `save_weights`, before ZeRO-3 partitions them."""
    saved = load_file(folder / "adapter_model.safetensors")
    for name, parameter in adapter_parameters(adapters):
        parameter.data.copy_(saved[name])


def fingerprint(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 of the names and first rows of a model's weights: it changes when the model is trained."""
    digest = hashlib.sha256()
    for name, tensor in weights:
        digest.update(name.encode())
        digest.update(torch.atleast_1d(tensor)[:1].cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
