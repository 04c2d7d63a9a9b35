"""Model families: what differs between vision-language models, one file each, named as the config's `model_type`.

A new family is a file here with a `FAMILY`, an instance of a class made from `Family` or of another family's
(internvl.py is an example), and nothing else: training, the rollout engines, `rethinker plan` and the tests find it by
the file's name. The model must be one that transformers and vLLM both support, with `model.language_model`, `lm_head`
and `get_input_embeddings()`.

This file does not import torch: a folder of another kind fails before any slow import.
"""

from __future__ import annotations

import pkgutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from rethinker.config import ConfigError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

HIDDEN, PATCH, SIDE = 64, 8, 64
"""Of tiny models: hidden size of the language model, side of a patch, and of the largest image in training."""
STRIP = 16
"""Image tokens from top to bottom of the image that stands for all of a planned micro-batch's, if any size will do."""
ATTENTION = ("full_attention", "sliding_attention")
"""Types of layers that look at earlier tokens; those of any other type are recurrent."""
FAMILIES = sorted(module.name for module in pkgutil.iter_modules(__path__))
SUPPORTED = ", ".join(FAMILIES)


class Family(ABC):
    """What a family defines. P tokens of a prompt, N image tokens, D hidden size of the language model.

    `image_inputs` are the tensors of one or more images by the names that the model gives them, joined along their
    first dimension. What is not abstract is right for a model with plain positions and tiles of one size.
    """

    PROCESSOR: str | tuple[str, ...]
    """Class name of the processor, or several. Families that share one treat its images alike."""
    PLACEHOLDERS: tuple[str, ...]
    """Tokens that replace pixels or open a turn: a response ends at the first one."""
    IMAGE_INPUTS: tuple[str, ...] = ("pixel_values",)
    """Which of the image processor's outputs transformers' own model takes."""
    MROPE = False
    """Whether a position has three parts (temporal, height, width)."""
    TOKEN_TYPES: str | None = None
    """The input of transformers' own forward that is 1 at image tokens, by its name, if it needs one."""
    ENLARGES = True
    """Whether an image below `data.min_pixels` is enlarged to them."""
    TINY: tuple[str, ...] = ("",)
    """Kinds of tiny models, by what they are called in tests after the family: one for each part that may differ."""
    CONFIGURED: tuple[str, ...] = ()
    """Which of `image_settings` the model's config has too, where vLLM and transformers' model read them."""
    SERVED: tuple[tuple[str, str], ...] = ()
    """How names of weights begin in transformers' model and, in its place, in checkpoints, which vLLM reads."""

    @abstractmethod
    def image_settings(self, image_processor: Any, min_pixels: int, max_pixels: int) -> dict[str, Any]:
        """The image processor's own settings for `data.min_pixels` and `data.max_pixels`."""

    def vllm_settings(self, settings: dict[str, Any], longest: int) -> dict[str, Any]:
        """vLLM's engine arguments for what `image_settings` returned; `longest`: tokens of a prompt and response."""
        return {"mm_processor_kwargs": settings}

    @abstractmethod
    def image_ids(self, processor: Any, height: int, width: int) -> list[int]:
        """The tokens of an image in the prompt. Raises ValueError for a shape that the processor does not take."""

    def image_arguments(self, processor: Any) -> dict[str, Any]:
        """What the processor tells its image processor besides the images."""
        return {}

    def joined(self, processor: Any, ids: list[int]) -> list[int]:
        """A prompt's tokens, with `image_ids` for its images, as they are where the tokenizer joins text and image."""
        return ids

    def image_inputs(self, made: Any) -> dict[str, torch.Tensor]:
        """What `features` takes, from what the image processor has made of one prompt's images; pixels are fp32."""
        return {name: made[name] for name in self.IMAGE_INPUTS}

    def reduced(self, image_processor: Any, image: Image) -> Image:
        """A large image in the size that the processor would give it, where that changes no pixel of the result."""
        return image

    def shown(self, image_processor: Any, height: int, width: int) -> tuple[int, int]:
        """(height, width) in which the model sees an image of that size, in whose pixels it counts; by default its
        own."""
        return height, width

    def served(self, name: str) -> str:
        """A parameter's name in checkpoints; see SERVED."""
        for ours, theirs in self.SERVED:
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        return name

    def language_model(self, model: torch.nn.Module) -> torch.nn.Module:
        """The decoder, whose `layers` are the decoder layers."""
        return model.model.language_model

    def routers(self, model: torch.nn.Module) -> dict[int, torch.nn.Module]:
        """The modules that choose each token's experts, by the number of their decoder layer, of the layers that have
        experts; policy/experts.py's Router takes their place."""
        blocks = [getattr(layer, "mlp", None) for layer in self.language_model(model).layers]
        return {number: block.gate for number, block in enumerate(blocks) if hasattr(block, "experts")}

    def image_blocks(self, text_config: Any) -> tuple[str, ...]:
        """Types of layers in which the tokens of an image in the prompt, a run of placeholders, see each other both
        ways, as far as a window reaches back."""
        return ()

    def cached(self, text_config: Any) -> list[tuple[int, int]]:
        """Of every layer that keeps keys of its own: how many heads they have, and their size."""
        types = getattr(text_config, "layer_types", None) or ["full_attention"] * text_config.num_hidden_layers
        size = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
        return [(text_config.num_key_value_heads, size) for kind in types if kind in ATTENTION]

    def prepare(self, model: torch.nn.Module) -> None:  # noqa: B027  # most models need no change
        """Change what of the model cannot read a packed row, in place; weights and their names stay."""

    def tail(self, text_config: Any) -> int | None:
        """Earlier inputs that a convolution of its recurrent layers sees; None for a model without such layers.

        With recurrent layers, the layers of every other type than full and sliding attention get policy/recurrent.py's
        Sequences as their mask.
        """
        return None

    def state(self, text_config: Any, size: int) -> int:
        """Bytes that vLLM keeps of a sequence for the recurrent layers; `size`: of a number in the model's type."""
        return 0

    def vision_modules(self, model: torch.nn.Module) -> list[torch.nn.Module]:
        """All that turns pixels into image tokens: what policy.freeze_vision freezes."""
        return [model.model.vision_tower, model.model.multi_modal_projector]

    def positions(self, model: torch.nn.Module, ids: torch.Tensor, image_inputs: dict) -> torch.Tensor:
        """Positions of a prompt's tokens `ids` [1, P]: [3, P] under M-RoPE, else [1, P]."""
        import torch

        return torch.arange(ids.shape[1])[None]

    def token_inputs(self, model: torch.nn.Module, ids: torch.Tensor, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the decoder is given of every token besides its embedding, by the decoder's own names: [T, ...] each.

        Args:
            ids: [T] int64.
            image: [T] bool: an image's token in a prompt.
        """
        return {}

    @abstractmethod
    def features(self, model: torch.nn.Module, image_inputs: dict) -> list[torch.Tensor]:
        """Image tokens [N, D], and what else is added to them after each of the first decoder layers, [N, D] each."""

    def blank(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """image_inputs of the smallest image: a rank without images runs it, to keep ZeRO-3's collectives in step.

        By default an image, or a tile of one, of the vision tower's own size.
        """
        import torch

        vision = model.config.vision_config
        size = vision.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return {"pixel_values": torch.zeros(1, vision.num_channels, height, width)}

    @abstractmethod
    def image_tokens(self, config: Any, pixels: int) -> int:
        """Tokens of an image of so many pixels, from the model's config; what `rethinker plan` counts."""

    def planned(self, model: torch.nn.Module, tokens: int) -> dict[str, torch.Tensor]:
        """image_inputs of at least so many image tokens, their pixels without data (device "meta")."""
        import torch

        count = -(-tokens // self.image_tokens(model.config, 0))
        return {"pixel_values": torch.empty(count, *self.blank(model)["pixel_values"].shape[1:], device="meta")}

    @abstractmethod
    def tiny(self, tokenizer: Any, hidden: int = HIDDEN, kind: str = "") -> tuple[type, Any, Any]:
        """A tiny random model for tests: class, config and processor, around embedded/tokenizer.py's tokenizer.

        The family's own architecture, only small. Attention heads have 32 dimensions, the least that vLLM's CPU kernel
        takes.

        Args:
            hidden: size of the language model.
            kind: one of TINY.
        """

    def draw(self, name: str, values: torch.Tensor) -> None:  # noqa: B027  # most change something as they are
        """Draw, in place, a vector of a tiny random model's weights, or a buffer of its checkpoint, by its name."""


def family_of(model_type: str, named: str = "policy.model") -> Family:
    """The family of a config's `model_type`; see `check_supported`."""
    check_supported(model_type, named)
    return import_module(f"{__name__}.{model_type}").FAMILY


def check_supported(model_type: Any, named: str, detail: str = "") -> None:
    """Check a config's `model_type` without importing the family.

    Raises:
        ConfigError: the model that the user `named`, such as `policy.model=NAME`, is of no supported family.
    """
    if model_type not in FAMILIES:  # a file may say anything that JSON can hold
        raise ConfigError(f"{named} is a {model_type!r} model{detail}; supported: {SUPPORTED}")


def family_of_processor(processor: Any) -> Family:
    """A family of a Hugging Face processor, which tells all that prompts and pixels depend on.

    Raises:
        ConfigError: it is of no supported family.
    """
    name = type(processor).__name__
    for family in map(family_of, FAMILIES):
        named = family.PROCESSOR
        if name in ((named,) if isinstance(named, str) else named):
            return family
    raise ConfigError(f"policy.model: its processor is a {name}, of no supported family ({SUPPORTED})")


def limit_pixels(processor: Any, family: Family, min_pixels: int, max_pixels: int) -> None:
    """Set a processor's pixel limits in place, so that it carries them wherever it is saved."""
    images = processor.image_processor
    for name, value in family.image_settings(images, min_pixels, max_pixels).items():
        setattr(images, name, type(getattr(images, name))(**value) if isinstance(value, dict) else value)


def configure(config: Any, family: Family, processor: Any) -> None:
    """Set in a model's config, in place, what it has of its processor's pixel limits."""
    for name in family.CONFIGURED:
        setattr(config, name, getattr(processor.image_processor, name))


def tiny_tokenizer(tokenizer: Any, names: dict[str, str], others: Iterable[str] = ()) -> Any:
    """A tiny model's tokenizer with further special tokens: by the `names` that a processor asks for, and `others`."""
    from transformers import AddedToken, AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:  # only loading gives tokens their names
        tokenizer.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(
            folder, extra_special_tokens=names, trust_remote_code=False, local_files_only=True
        )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in others], special_tokens=True)
    return tokenizer


def tiny_text(tokenizer: Any, hidden: int, **others: Any) -> dict[str, Any]:
    """The text_config of a tiny model, with or in place of its entries the `others`."""
    to_id = tokenizer.convert_tokens_to_ids
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "bos_token_id": to_id("<|endoftext|>"),
        "eos_token_id": to_id("<|im_end|>"),
        "pad_token_id": to_id("<|endoftext|>"),
        **others,
    }


def tiny_tower(**others: Any) -> dict[str, Any]:
    """The vision_config of a tiny model whose tower is a plain one, with or in place of its entries the `others`."""
    return {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "patch_size": PATCH,
        **others,
    }


def tiny_template(image: str) -> str:
    """A chat template as Qwen2's, which writes `image` for an image."""
    return (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}"
        "{% else %}{% for content in message['content'] %}"
        "{% if content['type'] == 'image' %}" + image + "{% elif content['type'] == 'text' %}{{ content['text'] }}"
        "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
