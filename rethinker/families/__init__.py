"""Model families: what differs between vision-language models, one small module each, and nothing else.

A new family is a module here with the names of `Family` (internvl.py is an example), a line in FAMILIES, and a tiny
random model in tests/families/tiny_models.py, from which the tests there check laws 1 and 2 and a training run. The
model must be one that transformers and vLLM both support, with `model.language_model`, `lm_head` and
`get_input_embeddings()`.

This file does not import torch: a folder of another kind fails before any slow import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from rethinker.config import ConfigError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

# model_type of the config: (the module here, class name of the processor)
FAMILIES = {
    "qwen2_5_vl": ("qwen_vl", "Qwen2_5_VLProcessor"),
    "qwen2_vl": ("qwen_vl", "Qwen2VLProcessor"),
    "qwen3_vl": ("qwen_vl", "Qwen3VLProcessor"),
    "internvl": ("internvl", "InternVLProcessor"),
}
SUPPORTED = ", ".join(FAMILIES)


class Family(Protocol):
    """What a family's module defines. P tokens of a prompt, N image tokens, D hidden size of the language model.

    `image_inputs` are the tensors of one or more images by the names that the model gives them, joined along their
    first dimension.
    """

    PLACEHOLDERS: tuple[str, ...]
    """Tokens that replace pixels or open a turn: a response ends at the first one."""
    IMAGE_INPUTS: tuple[str, ...]
    """Which of the image processor's outputs the model takes."""
    MROPE: bool
    """Whether a position has three parts (temporal, height, width)."""

    def image_settings(self, image_processor: Any, min_pixels: int, max_pixels: int) -> dict[str, Any]:
        """The image processor's own settings for `data.min_pixels` and `data.max_pixels`."""

    def image_ids(self, processor: Any, height: int, width: int) -> list[int]:
        """The tokens of an image in the prompt. Raises ValueError for a shape that the processor does not take."""

    def reduced(self, image_processor: Any, image: Image) -> Image:
        """A large image in the size that the processor would give it, where that changes no pixel of the result."""

    def vision_modules(self, model: torch.nn.Module) -> list[torch.nn.Module]:
        """All that turns pixels into image tokens: what policy.freeze_vision freezes."""

    def positions(self, model: torch.nn.Module, ids: torch.Tensor, image_inputs: dict) -> torch.Tensor:
        """Positions of a prompt's tokens `ids` [1, P]: [3, P] under M-RoPE, else [1, P]."""

    def features(self, model: torch.nn.Module, image_inputs: dict) -> list[torch.Tensor]:
        """Image tokens [N, D], and what else is added to them after each of the first decoder layers, [N, D] each."""

    def blank(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """image_inputs of the smallest image: a rank without images runs it, to keep ZeRO-3's collectives in step."""


def family_of(model_type: str, named: str = "policy.model") -> Family:
    """The family of a config's `model_type`; see `check_supported`."""
    check_supported(model_type, named)
    return import_module(f"{__name__}.{FAMILIES[model_type][0]}")


def check_supported(model_type: Any, named: str, detail: str = "") -> None:
    """Check a config's `model_type` without importing the family.

    Raises:
        ConfigError: the model that the user `named`, such as `policy.model=NAME`, is of no supported family.
    """
    if model_type not in tuple(FAMILIES):  # a file may say anything that JSON can hold
        raise ConfigError(f"{named} is a {model_type!r} model{detail}; supported: {SUPPORTED}")


def family_of_processor(processor: Any) -> Family:
    """The family of a Hugging Face processor.

    Raises:
        ConfigError: it is of no supported family.
    """
    name = type(processor).__name__
    for module, class_name in FAMILIES.values():
        if name == class_name:
            return import_module(f"{__name__}.{module}")
    raise ConfigError(f"policy.model: its processor is a {name}, of no supported family ({SUPPORTED})")


def limit_pixels(processor: Any, family: Family, min_pixels: int, max_pixels: int) -> None:
    """Set a processor's pixel limits in place, so that it carries them wherever it is saved."""
    images = processor.image_processor
    for name, value in family.image_settings(images, min_pixels, max_pixels).items():
        setattr(images, name, type(getattr(images, name))(**value) if isinstance(value, dict) else value)
