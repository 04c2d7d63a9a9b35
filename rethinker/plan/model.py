"""The policy of a run without its weights: what training would set up, on the device "meta", and its sizes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rethinker.config import ConfigError, PolicyConfig, one_line
from rethinker.embedded import tiny
from rethinker.embedded.tokenizer import train_tokenizer
from rethinker.families import family_of
from rethinker.policy.attention import LayerTypes, kernel_for
from rethinker.policy.cpu_layers import use_cpu_layers
from rethinker.policy.lora import GATHERED, add_adapters, base_parameters
from rethinker.policy.model import Policy


@dataclass(frozen=True)
class Shape:
    """A policy and what memory depends on; counts are of parameters."""

    policy: Policy
    parameters: int  # of the model, without adapters
    adapters: int
    trained: int  # those that have gradients and optimizer state
    largest_group: int  # what a weight sync gathers at once: GATHERED, or the largest weight
    on_gpu: bool
    merged: int  # the largest weight that adapters are merged into; 0 without adapters

    @property
    def config(self) -> Any:
        """The Hugging Face config."""
        return self.policy.hf.config

    @property
    def text(self) -> Any:
        """The language model's config."""
        return self.config.get_text_config()

    @property
    def head(self) -> torch.nn.Parameter:
        """The LM head's weight [V, D]: as large as the embedding, or the same."""
        return self.policy.hf.lm_head.weight

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight."""
        return self.head.itemsize

    def image_tokens(self, pixels: int) -> int:
        """Tokens of an image of so many pixels."""
        return self.policy.family.image_tokens(self.config, pixels)

    def images(self, tokens: int) -> dict[str, torch.Tensor]:
        """Pixels without data of at least so many image tokens, as the family's model takes them."""
        return self.policy.family.planned(self.policy.hf, tokens)


def shape_of(settings: PolicyConfig, on_gpu: bool = False) -> Shape:
    """The policy that `settings` name, as it trains on GPUs or on a CPU; compiled layers are counted as others are.

    Raises:
        ConfigError: there is no config.json, no policy of this kind, or no layer that policy.lora.target_modules names.
    """
    from transformers import AutoModelForImageTextToText  # after rethinker.policy, which repairs torchvision

    config = config_of(settings.model)
    family = family_of(config.model_type, f"policy.model={settings.model}")
    plain = PolicyConfig(
        attention=kernel_for(settings, on_gpu, LayerTypes.of(family, config.get_text_config())),
        freeze_vision=settings.freeze_vision,
        gradient_checkpointing=settings.gradient_checkpointing,
        lora=settings.lora,
    )
    with torch.device("meta"):
        try:
            model = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, settings.dtype))
        except (ValueError, AttributeError, RuntimeError) as error:
            raise ConfigError(f"policy.model={settings.model} cannot be planned: {one_line(error)}") from error
    adapters = add_adapters(model, settings.lora, seed=0) if settings.lora.rank else {}
    if not on_gpu:
        use_cpu_layers(model, "meta")
    policy = Policy(model, plain).eval()

    def count(parameters: Any) -> int:
        return sum(parameter.numel() for parameter in parameters)

    base = dict(base_parameters(model))
    parameters = count(base.values())
    return Shape(
        policy,
        parameters=parameters,
        adapters=count(part for adapter in adapters.values() for part in (adapter.a, adapter.b)),
        trained=count(parameter for parameter in model.parameters() if parameter.requires_grad),
        largest_group=max(min(GATHERED, parameters), *(weight.numel() for weight in base.values())),
        on_gpu=on_gpu,
        merged=max((base[name].numel() for name in adapters), default=0),
    )


def config_of(model: str) -> Any:
    """The Hugging Face config of `policy.model`: `tiny`, a folder, or a name in the hub.

    Raises:
        ConfigError: there is none, or the hub cannot be reached.
    """
    from transformers import AutoConfig

    if model == "tiny":
        return tiny._config(tiny.DEFAULT_SIZE, train_tokenizer((), merges=tiny.DEFAULT_SIZE.merges), True)
    try:
        config = AutoConfig.from_pretrained(str(Path(model).expanduser()), trust_remote_code=False)
    except Exception as error:  # a file may hold anything
        raise ConfigError(
            f"policy.model={model}: no config.json could be read; where the hub cannot be reached, give a folder that "
            f"holds it (elsewhere: hf download NAME config.json --local-dir FOLDER): {one_line(error, longest=150)}"
        ) from None
    if getattr(config, "vision_config", config) is None:
        raise ConfigError(f"policy.model={model}: its config.json has no vision_config")
    return config
